"""Whether files of the cache are still those that were written: sealed manifests, hashes, and a note of what was verified last.

Against damage: cut, flipped, half copied, rewritten. Not against a forger, who can write a seal too. Must not know what a file holds.
A folder has manifest.json, whose "files" are {name: [bytes, hash]}, and verified.json, the note: a file that still has the size, the time
of change and the inode noted there is not hashed again, so that a warm start costs a look at each file, and a copied folder one hashing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from atomic import write_text_atomic
from errors import RunError
from store_files import write_synced

MANIFEST, VERIFIED = "manifest.json", "verified.json"
CHUNK_BYTES = 1 << 22
MAX_THREADS = 8
_SEAL = re.compile(rb'"seal": "([0-9a-f]{32})"\n}\n\Z')


class DamageError(Exception):
    """A folder of the cache that cannot be used; says in a few words which file and why."""


class StaleError(DamageError):
    """It is whole, but not what was asked for."""


def measure(folder: Path, names: Iterable[str]) -> dict[str, list]:
    """{name: [bytes, hash]} of files. Memory: a few chunks.

    A hash is of the CRC-32 of each CHUNK_BYTES: those are found by several threads, also in one large file, at 4 GB/s a core where
    BLAKE2b makes 0.9 (AMD EPYC). A CRC-32 finds every flipped bit, and misses other damage once in 4e9.
    """
    found = {}
    with ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0)))) as pool:
        for name in sorted(names):
            with open(folder / name, "rb") as file:
                size, descriptor = os.fstat(file.fileno()).st_size, file.fileno()
                crcs = pool.map(lambda begin: zlib.crc32(os.pread(descriptor, CHUNK_BYTES, begin)), range(0, size, CHUNK_BYTES))
                found[name] = [size, _digest(b"".join(crc.to_bytes(4, "little") for crc in crcs))]
    return found


def write_sealed(path: Path, tree: dict) -> str:
    """Write a JSON object that ends with a hash of all before it, its seal, so that it is on the disk; returns the seal."""
    body = (json.dumps(tree, indent=1)[:-2] + ",\n ").encode()
    seal = _digest(body)
    write_synced(path, body + f'"seal": "{seal}"\n}}\n'.encode())
    return seal


def read_sealed(path: Path) -> dict:
    """What write_sealed wrote, its "seal" included. DamageError for anything else: nothing is parsed whose seal is not right."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DamageError(f"{path.name} cannot be read ({error.strerror})") from None
    found = _SEAL.search(data)
    if found is None or found.group(1).decode() != _digest(data[: found.start()]):
        raise DamageError(f"{path.name} is not what was written")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        tree = None
    if not isinstance(tree, dict):
        raise DamageError(f"{path.name} is not one of ours")
    return tree


def note(folder: Path, names: Iterable[str], seal: str) -> None:
    """Note files, just written or verified, as those of the manifest with this seal."""
    _write_note(folder, seal, {name: _identity(folder / name) for name in names})


def verified(folder: Path, expected: dict, *, hashing: bool = True, everything: bool = False) -> dict | None:
    """The manifest of a folder whose files are those that were written; what was not noted is hashed, and noted.

    expected: what the manifest must say, {key: value}. hashing: False gives None where a file is not noted. everything: hash all files,
    whatever is noted. DamageError where one is missing or another.
    """
    manifest = read_sealed(folder / MANIFEST)
    if any(manifest.get(key) != value for key, value in expected.items()):
        raise StaleError(f"{MANIFEST} is of another version or of other data")
    files, seal = manifest.get("files"), manifest["seal"]
    if not isinstance(files, dict) or not all(isinstance(facts, list) and len(facts) == 2 for facts in files.values()):
        raise DamageError(f"{MANIFEST} is not one of ours")
    try:
        present = {name: _identity(folder / name) for name in files}
    except OSError as error:
        raise DamageError(f"{Path(error.filename).name} cannot be read ({error.strerror})") from None
    for name, (size, _) in files.items():
        if present[name][0] != size:
            raise DamageError(f"{name} has {present[name][0]:,} bytes in place of {size}")
    noted = {} if everything else _read_note(folder, seal)
    unknown = [name for name in files if noted.get(name) != present[name]]
    if unknown and not hashing:
        return None
    if unknown:
        try:
            found = measure(folder, unknown)
        except OSError as error:
            raise DamageError(f"a file cannot be read ({error.strerror})") from None
        for name in unknown:
            if found[name] != files[name]:
                raise DamageError(f"the content of {name} is not what was written")
        _write_note(folder, seal, present)
    return manifest


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _identity(path: Path) -> list[int]:
    facts = path.stat()
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]


def _read_note(folder: Path, seal: str) -> dict:
    """{name: identity} as last verified; {} where nothing is noted for this manifest: all is hashed then."""
    try:
        tree = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
        return tree["files"] if tree["seal"] == seal and isinstance(tree["files"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}


def _write_note(folder: Path, seal: str, identities: dict[str, list[int]]) -> None:
    try:
        write_text_atomic(folder / VERIFIED, json.dumps({"seal": seal, "files": identities}) + "\n")
    except (OSError, RunError):
        return  # a full disk, or one that may only be read: the next start verifies again
