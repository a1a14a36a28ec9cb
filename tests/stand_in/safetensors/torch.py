"""save_file and load_file for contiguous tensors, after the format's description: u64 length, JSON header, then the tensors' bytes."""

import json
import math
import struct
from pathlib import Path

import torch

TYPES = {"F32": torch.float32, "F16": torch.float16, "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def save_file(tensors, filename, metadata=None):
    names, header, parts, place = {dtype: name for name, dtype in TYPES.items()}, {}, [], 0
    assert len({t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()}) == sum(t.numel() > 0 for t in tensors.values())
    for key, tensor in tensors.items():
        assert tensor.is_contiguous() and tensor.device.type == "cpu", key
        data = tensor.detach().numpy().tobytes()
        header[key] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [place, place + len(data)]}
        parts.append(data)
        place += len(data)
    text = json.dumps(header | ({"__metadata__": metadata} if metadata else {})).encode()
    text += b" " * (-len(text) % 8)
    Path(filename).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(parts))


def load_file(filename, device="cpu"):
    data = Path(filename).read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header, found = json.loads(data[8 : 8 + size]), {}
    for key, row in header.items():
        if key == "__metadata__":
            continue
        begin, end = (8 + size + place for place in row["data_offsets"])
        tensor = (
            torch.frombuffer(bytearray(data[begin:end]), dtype=TYPES[row["dtype"]])
            if end > begin
            else torch.empty(0, dtype=TYPES[row["dtype"]])
        )
        assert tensor.numel() == math.prod(row["shape"])
        found[key] = tensor.reshape(row["shape"])
    return found
