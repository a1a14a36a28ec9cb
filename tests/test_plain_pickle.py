"""Plain data comes back as it was; nothing else is ever run, built or looked up."""

import functools
import os
import pickle
import random
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from errors import UserError
from plain_pickle import load_plain_pickle

pytestmark = [pytest.mark.reliability, pytest.mark.fast]

PLAIN = [
    {"u": {"a": 1}, "i": {10**15: 2, 2**64 - 1: 3}, "f": {"100": {"x": 1}}},
    [1, -(2**70), 2.5, True, None, "é", b"\xff\x00", b"", (), (1, (2, [3]))],
    {1, 2}, frozenset({"a"}), set(), 1 + 2j,
    np.arange(3, dtype=np.float32), np.arange(6.0).reshape(2, 3).T, np.arange(24).reshape(2, 3, 4)[:, ::2], np.zeros((0, 3)),
    np.array(5.0), np.array([True, False]), np.array(["a", "bcd"]), np.array([b"xx"]), np.arange(3, dtype=">i4"),
    np.float16(1.5), np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("abc"), {7: np.ones(4, np.float32), "8": [0.5] * 4},
]  # fmt: skip
UNPLAIN = [np.array([None]), np.array([[1], "a"], dtype=object), np.zeros(2, "i4,f4"), np.zeros(2, "V3"), np.datetime64(3, "s"),
           np.zeros(2, "M8[s]"), Path("/tmp"), slice(1), int, len, range(3), np.ma.masked_array([1.0]),
           np.random.default_rng(0)]  # fmt: skip


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        native = a.dtype.newbyteorder("=")
        return isinstance(b, np.ndarray) and a.shape == b.shape and native == b.dtype.newbyteorder("=") and bool((a == b).all())
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def write(folder: Path, data: bytes) -> Path:
    path = folder / "file.pkl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_comes_back(tmp_path, protocol):
    for value in PLAIN:
        found = load_plain_pickle(write(tmp_path, pickle.dumps(value, protocol=protocol)))
        assert same(value, found), (value, found)


def test_arrays_can_be_used_and_written_to(tmp_path):
    found = load_plain_pickle(write(tmp_path, pickle.dumps({k: np.full(3, k, np.float32) for k in range(3)}, protocol=4)))
    matrix = np.stack(list(found.values()))
    assert matrix.dtype == np.float32 and matrix.tolist() == [[0.0] * 3, [1.0] * 3, [2.0] * 3]
    found[0][1] = 5
    assert found[0].tolist() == [0, 5, 0]


def test_names_of_numpy_before_2(tmp_path):
    data = pickle.dumps(np.arange(3, dtype=np.float32), protocol=3)
    assert b"numpy._core" in data or b"numpy.core" in data
    for core in (b"numpy.core", b"numpy._core"):
        old = data.replace(b"cnumpy._core.", b"c" + core + b".").replace(b"cnumpy.core.", b"c" + core + b".")
        assert load_plain_pickle(write(tmp_path, old)).tolist() == [0, 1, 2]


@pytest.mark.parametrize("protocol", (0, 2, 4, 5))
def test_other_objects_are_refused_by_name(tmp_path, protocol):
    for value in UNPLAIN:
        if protocol == 0 and isinstance(value, np.random.Generator):
            continue
        path = write(tmp_path, pickle.dumps(value, protocol=protocol))
        with pytest.raises(UserError, match="refused") as caught:
            load_plain_pickle(path)
        assert str(path) in str(caught.value) and len(str(caught.value).splitlines()) <= 3


class Calls:
    """Pickles to a call of `function(*args)`."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts


def hostile(canary: Path) -> dict[str, bytes]:
    """Files that try to make `canary`, by name of the global or thing that must be refused."""
    touch = f"touch {canary}"
    code = f"open({str(canary)!r}, 'w').close()"
    name = str(canary).encode()
    dumped = {
        "system": Calls(os.system, touch), "eval": Calls(eval, code), "exec": Calls(exec, code), "open": Calls(open, str(canary), "w"),
        "Popen": Calls(subprocess.Popen, ["touch", str(canary)]), "check_output": Calls(subprocess.check_output, ["touch", str(canary)]),
        "__import__": Calls(__import__, "antigravity"),
        "map": Calls(map, os.system, [touch]), "compile": Calls(compile, code, "x", "exec"), "partial": functools.partial(os.system, touch),
        "hidden in a dict key": {(Calls(os.system, touch),): 1}, "in an array": np.array([Calls(os.system, touch)], dtype=object),
    }  # fmt: skip
    files = {key: pickle.dumps(value, protocol=4) for key, value in dumped.items()}
    files |= {f"{key}, protocol 0": pickle.dumps(dumped[key], protocol=0) for key in ("system", "eval")}
    return files | {
        "getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'" + touch.encode() + b"'\ntR.",
        "dotted name, getattr chain inside the unpickler": b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.mro\x93)R.",
        "dotted name to os": b"\x80\x04\x8c\x08builtins\x8c\x0c__import__.x\x93\x8c\x02os\x85R.",
        "posix": b"cposix\nsystem\n(S'touch " + name + b"'\ntR.",
        "inst opcode": b"(S'touch " + name + b"'\nios\nsystem\n.",
        "obj opcode": b"(cos\nsystem\nS'touch " + name + b"'\no.",
        "runstring": b'cnumpy.testing._private.utils\nrunstring\n(S"' + code.encode() + b'"\n}tR.',
        "numpy.load": b"cnumpy\nload\n(S'/etc/passwd'\ntR.",
        "fromfile": b"cnumpy\nfromfile\n(S'/etc/passwd'\ntR.",
        "memmap": b"cnumpy\nmemmap\n(S'" + name + b"'\ntR.",
        "torch": b"ctorch.storage\n_load_from_bytes\n(C\x01xtR.",
        "copyreg": b"ccopyreg\n_reconstructor\n.",
        "extension registry": b"\x82\x01.",
        "persistent id": b"Pos.system\n.",
        "binary persistent id": b"\x8c\x02osQ.",
        "codec": b"c_codecs\nencode\n(S'x'\nS'zlib'\ntR.",
        "codec lookup": b"c_codecs\nlookup\n(S'x'\ntR.",
        "state for a function": b"c_codecs\nencode\n(N}S'_answer'\nK\x01stb.",
        "ndarray by itself": b"cnumpy\nndarray\n(K\x03tR.",
        "new ndarray": b"cnumpy\nndarray\n(K\x03t\x81.",
        "another array class": b"cnumpy.core.multiarray\n_reconstruct\n(K\x01(K\x00tC\x01btR.",
    }  # fmt: skip


def test_hostile_files_run_nothing(tmp_path):
    canary = tmp_path / "canary"
    files = hostile(canary)
    assert len(files) >= 25
    sys.modules.pop("antigravity", None)
    for what, data in files.items():
        with pytest.raises(UserError) as caught:
            load_plain_pickle(write(tmp_path, data))
        assert "file.pkl" in str(caught.value), what
        assert not canary.exists(), what
    assert "antigravity" not in sys.modules


def test_the_hostile_files_are_dangerous_elsewhere(tmp_path):
    canary = tmp_path / "canary"
    for what in ("system", "eval", "exec", "getattr", "inst opcode", "obj opcode", "hidden in a dict key", "system, protocol 0"):
        subprocess.run([sys.executable, "-c", "import pickle, sys; pickle.Unpickler(sys.stdin.buffer).load()"], input=hostile(canary)[what],
                       stderr=subprocess.DEVNULL, check=False)  # fmt: skip
        assert canary.exists(), what
        canary.unlink()


def test_the_refused_global_is_named(tmp_path):
    escape = (b"cevil\x1b[31m\nx\n.", r"evil\x1b[31m.x")
    for data, name in ((b"cos\nsystem\n.", "os.system"), (pickle.dumps(eval), "builtins.eval"), escape):
        with pytest.raises(UserError, match="nothing of it was run") as caught:
            load_plain_pickle(write(tmp_path, data))
        assert name in str(caught.value)


def forged_array(shape: str, code: str, state: str, raw: bytes) -> bytes:
    return (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR(K\x01" + shape.encode()
            + b"cnumpy\ndtype\n(S'" + code.encode() + b"'\nK\x00K\x01tR" + state.encode()
            + b"\x89C" + bytes([len(raw)]) + raw + b"tb.")  # fmt: skip


def test_forged_arrays_are_refused(tmp_path):
    state = "(K\x03S'|'\nNNNI-1\nI-1\nK\x00tb"
    assert load_plain_pickle(write(tmp_path, forged_array("(K\x02t", "i1", state, b"ab"))).tolist() == [97, 98]
    cases = {
        "objects from bytes": ("(K\x01t", "O8", state, b"\x41" * 8), "void": ("(K\x01t", "V8", state, b"\x41" * 8),
        "fields put in later": ("(K\x01t", "i8", "(K\x03S'|'\nN(S'a'\nt}S'a'\n(cnumpy\ndtype\n(S'i8'\ntRK\x00tsI8\nI8\nK\x00tb",
                                b"\x41" * 8),
        "subarray put in later": ("(K\x01t", "i8", "(K\x03S'|'\n(cnumpy\ndtype\n(S'i8'\ntR(K\x01ttNNI-1\nI-1\nK\x00tb", b"\x41" * 8),
        "too few bytes": ("(K\x09t", "i8", state, b"\x41" * 8), "too many": ("(K\x01t", "i1", state, b"abc"),
        "negative shape": ("(I-1\nI-8\nt", "i1", state, b"abcdefgh"),
        "shape that overflows": ("(I4294967296\nI4294967296\nI8\nt", "i1", state, b"x"),
        "no shape": ("N", "i1", state, b"x"), "unknown order": ("(K\x01t", "i1", "(K\x03S'?'\nNNNI-1\nI-1\nK\x00tb", b"x"),
        "an expression": ("(K\x01t", "i1,O", state, b"x" * 9), "a type by name": ("(K\x01t", "object", state, b"x" * 8),
    }  # fmt: skip
    for what, parts in cases.items():
        with pytest.raises(UserError, match="refused|not a readable"):
            load_plain_pickle(write(tmp_path, forged_array(*parts)))
            pytest.fail(what)


def test_damaged_files(tmp_path):
    data = pickle.dumps({"a": [1, 2.5, "text"], 7: np.arange(5, dtype=np.float32)}, protocol=4)
    for length in range(len(data)):
        with pytest.raises(UserError):
            load_plain_pickle(write(tmp_path, data[:length]))
    for junk in (b"", b"\x00", b"not a pickle", b"\x80\x04.", b"\x80\xff.", b"[1, 2]", b"K\x01..", data + b"x"):
        with pytest.raises(UserError):
            load_plain_pickle(write(tmp_path, junk))


def test_flipped_bits_never_do_more_than_fail(tmp_path):
    chance = random.Random(0)
    for protocol in (2, 4, 5):
        data = pickle.dumps({"a": [1, (2.5, "text")], 7: np.arange(5, dtype=np.float32), "s": {1, 2}}, protocol=protocol)
        for _ in range(400):
            flipped = bytearray(data)
            flipped[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            try:
                load_plain_pickle(write(tmp_path, bytes(flipped)))
            except UserError:
                pass


def test_forged_indexes_do_not_eat_the_memory(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_AS)
    forged = (b"Nr\xff\xff\xff\xff.", b"Np99999999999\n.", b"\x96" + b"\xff" * 5 + b"\0\0\0x.", b"\x8e" + b"\xff" * 7 + b"\x7fx.")
    for data in forged:
        path = write(tmp_path, data)
        with pytest.raises(UserError, match="damaged"):
            load_plain_pickle(path)
        assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_plain_pickle(tmp_path / "absent.pkl")
    with pytest.raises(UserError, match="is a folder"):
        load_plain_pickle(tmp_path)
