"""The store in the cache is never trusted: hashes, seals, what was verified when; damage is found before anything is read from it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from raw_worlds import make_world, write_jsonl
from test_store import with_vectors

import store_check
from store import Store, content_hash, fingerprint_of, is_compiled, open_store
from store_check import CHUNK_BYTES, MANIFEST, VERIFIED, DamageError, StaleError, measure, note, read_sealed, verified, write_sealed


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return with_vectors(write_jsonl(make_world(50, 120), tmp_path_factory.mktemp("data") / "a"))


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory) -> Path:
    """A cache with the store and its vectors."""
    cache = tmp_path_factory.mktemp("built") / "cache"
    opened(data, cache)
    return cache


@pytest.fixture
def cache(built: Path, data: Path, tmp_path: Path) -> Path:
    """A copy that was verified: as good as the first."""
    shutil.copytree(built, tmp_path / "cache")
    assert opened(data, tmp_path / "cache").cache_hit
    return tmp_path / "cache"


def opened(data: Path, cache: Path, **more: object) -> Store:
    return open_store(data, cache, embeddings=["81"], progress=False, **{"log": lambda _: None} | more)


def whole(store: Store) -> str:
    """A hash of all that a store holds, its vectors too."""
    vectors = store.embedding("81")
    return content_hash(store) + hashlib.blake2b(vectors.matrix.tobytes() + vectors.row_of_item.tobytes()).hexdigest()


def files_of(cache: Path) -> list[Path]:
    (path,) = cache.glob("store-????????????????")
    return sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)


def flip(file: Path, bit: int) -> None:
    """In place, as a disk or a program that writes astray would."""
    with open(file, "r+b") as out:
        out.seek(bit // 8)
        byte = out.read(1)[0] ^ (1 << bit % 8)
        out.seek(bit // 8)
        out.write(bytes([byte]))


# ---- the parts ----------------------------------------------------------------------------------------------------------


def test_a_hash_is_of_the_crc_of_each_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr(store_check, "CHUNK_BYTES", 8)
    (tmp_path / "a").write_bytes(b"0123456789abcdefXYZ")
    (tmp_path / "b").write_bytes(b"")
    crcs = b"".join(zlib.crc32(part).to_bytes(4, "little") for part in (b"01234567", b"89abcdef", b"XYZ"))
    assert measure(tmp_path, ["b", "a"]) == {
        "a": [19, hashlib.blake2b(crcs, digest_size=16).hexdigest()],
        "b": [0, hashlib.blake2b(b"", digest_size=16).hexdigest()],
    }
    assert CHUNK_BYTES == 1 << 22


def test_a_seal_holds_for_every_byte(tmp_path):
    path, tree = tmp_path / MANIFEST, {"version": 2, "files": {"a": [1, "x"]}}
    seal = write_sealed(path, tree)
    assert read_sealed(path) == tree | {"seal": seal} == json.loads(path.read_text())
    before = path.read_bytes()
    for bit in range(8 * len(before)):
        flip(path, bit)
        with pytest.raises(DamageError, match="manifest.json is not what was written"):
            read_sealed(path)
        flip(path, bit)
    for cut in range(len(before)):
        path.write_bytes(before[:cut])
        with pytest.raises(DamageError):
            read_sealed(path)
    path.unlink()
    with pytest.raises(DamageError, match="manifest.json cannot be read"):
        read_sealed(path)


def test_only_what_is_not_noted_is_hashed(tmp_path, monkeypatch):
    hashed: list[str] = []
    monkeypatch.setattr(store_check, "measure", lambda folder, names: [hashed.extend(names), measure(folder, names)][1])
    for name in "ab":
        (tmp_path / name).write_bytes(name.encode() * 9)
    write_sealed(tmp_path / MANIFEST, {"kind": "x", "files": measure(tmp_path, "ab")})
    assert verified(tmp_path, {"kind": "x"}, hashing=False) is None
    assert verified(tmp_path, {"kind": "x"})["kind"] == "x" and sorted(hashed) == ["a", "b"]
    hashed.clear()
    assert verified(tmp_path, {}) and not hashed
    assert verified(tmp_path, {}, everything=True) and sorted(hashed) == ["a", "b"]
    hashed.clear()
    os.utime(tmp_path / "b", ns=(1, 1))
    assert verified(tmp_path, {}, hashing=False) is None and verified(tmp_path, {}) and hashed == ["b"]
    for text in ("", "[]", "{", '{"seal": 1}', "[" * 100_000, json.dumps({"seal": read_sealed(tmp_path / MANIFEST)["seal"], "files": [1]})):
        hashed.clear()
        (tmp_path / VERIFIED).write_text(text)
        assert verified(tmp_path, {}) and sorted(hashed) == ["a", "b"]
    with pytest.raises(StaleError, match="of another version or of other data"):
        verified(tmp_path, {"kind": "y"})
    (tmp_path / "a").write_bytes(b"a" * 8)
    with pytest.raises(DamageError, match="a has 8 bytes in place of 9"):
        verified(tmp_path, {})
    (tmp_path / "a").write_bytes(b"b" * 9)
    with pytest.raises(DamageError, match="the content of a is not what was written"):
        verified(tmp_path, {})
    note(tmp_path, "ab", read_sealed(tmp_path / MANIFEST)["seal"])
    assert verified(tmp_path, {})  # as noted; the doctor hashes it all the same
    with pytest.raises(DamageError, match="the content of a"):
        verified(tmp_path, {}, everything=True)
    (tmp_path / "a").unlink()
    with pytest.raises(DamageError, match="a cannot be read"):
        verified(tmp_path, {})


def test_a_note_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")
    write_sealed(tmp_path / MANIFEST, {"files": measure(tmp_path, "a")})
    monkeypatch.setattr(store_check, "write_text_atomic", lambda *_: (_ for _ in ()).throw(OSError(30, "read-only")))
    assert verified(tmp_path, {}) and not (tmp_path / VERIFIED).exists()


# ---- the store ----------------------------------------------------------------------------------------------------------


def test_a_warm_start_hashes_nothing_and_a_copy_is_hashed_once(data, built, tmp_path, monkeypatch):
    hashed: list[str] = []
    monkeypatch.setattr(store_check, "measure", lambda folder, names: [hashed.extend(names), measure(folder, names)][1])
    assert opened(data, built).cache_hit and not hashed
    shutil.copytree(built, tmp_path / "cache")  # times are kept, inodes are not
    for count in (1, 0):
        store = opened(data, tmp_path / "cache")
        assert store.cache_hit and not store.mended and len(hashed) == count * (len(files_of(built)) - 4)
        hashed.clear()
    assert opened(data, tmp_path / "cache", verify_all=True).cache_hit and len(hashed) == len(files_of(built)) - 4
    assert is_compiled(data, tmp_path / "cache", embeddings=["81"])
    assert (tmp_path / "cache" / f"store-{fingerprint_of(data)}").is_dir() and fingerprint_of(data) != fingerprint_of(data, 1)
    flip(tmp_path / "cache" / files_of(built)[-1].parent.name / "item_ids.bin", 5)
    assert not is_compiled(data, tmp_path / "cache", embeddings=["81"])


def damage_and_open(data: Path, cache: Path, file: Path, harm, expected: str) -> bool:
    """Harm one file; the store is built anew, a line says which file, and all its content is as before. Returns whether it was found."""
    harm(file)
    said: list[str] = []
    store = opened(data, cache, log=said.append)
    found = [line for line in said if "compiling it anew" in line]
    assert whole(store) == expected and store.mended == found, (file, said)
    assert not found or file.name in found[0] or file.name == MANIFEST, (file, found)
    assert not [line for line in opened(data, cache, log=said.append).mended]
    return bool(found)


@pytest.mark.reliability
def test_cuts_and_flipped_bits_of_a_store(data, cache):
    """Each of 100 cuts and 100 flipped bits, over all files, is found before anything is read from the store."""
    chance, expected = random.Random(5), whole(opened(data, cache))
    found = {"cut": 0, "flip": 0, "note": 0}
    for number in range(200):
        files = files_of(cache)
        file = files[number // 2 % len(files)]
        size = file.stat().st_size
        cut = number % 2 == 0
        harm = (lambda f, n=chance.randrange(size): os.truncate(f, n)) if cut else (lambda f, n=chance.randrange(8 * size): flip(f, n))
        if damage_and_open(data, cache, file, harm, expected):
            found["cut" if cut else "flip"] += 1
        else:
            assert file.name == VERIFIED  # the note alone: all is hashed again, and is as it was
            found["note"] += 1
    print(f"\n{found}")
    assert sum(found.values()) == 200 and found["note"] < 30


@pytest.mark.parametrize("name", ["item_ids.bin", "user_offsets.bin", MANIFEST, "emb_81/matrix.npy", "emb_81/manifest.json"])
def test_a_flipped_bit_is_found_and_said(data, cache, name):
    expected = whole(opened(data, cache))
    (path,) = cache.glob("store-????????????????")
    assert damage_and_open(data, cache, path / name, lambda file: flip(file, 8 * (file.stat().st_size // 2) + 3), expected)


def test_the_doctor_s_way_finds_damage_behind_an_unchanged_time(data, cache):
    """A disk that loses a bit leaves size, time and inode alone."""
    expected = whole(opened(data, cache))
    (path,) = cache.glob("store-????????????????")
    for name in ("timestamps.bin", "emb_81/matrix.npy"):
        facts = (path / name).stat()
        flip(path / name, 8 * (facts.st_size - 1))
        os.utime(path / name, ns=(facts.st_atime_ns, facts.st_mtime_ns))
        assert not opened(data, cache).mended
        store = opened(data, cache, verify_all=True)
        assert len(store.mended) == 1 and Path(name).name in store.mended[0] and whole(store) == expected


VALUES = {"missing": None, "a number": 7, "a list": [1, 2], "deep": "deep"}


@pytest.mark.parametrize("sealed", [False, True], ids=["", "sealed"])
@pytest.mark.parametrize("what", VALUES)
def test_a_strange_manifest_is_compiled_anew(data, cache, what, sealed):
    """Of the store and of vectors: each key missing, of a wrong type, a list, nested deeply; also with a fitting seal."""
    expected = whole(opened(data, cache))
    (path,) = cache.glob("store-????????????????")
    for file in (path / MANIFEST, path / "emb_81" / MANIFEST):
        needed = {"version", "fingerprint", "kind", "schema", "cardinalities", "counts", "arrays", "files"} & json.loads(
            file.read_text()
        ).keys()
        for key in sorted(json.loads(file.read_text()).keys() - {"seal"} if not sealed else needed | {"summary"} - {"kind"}):
            tree = json.loads(file.read_text())
            if key not in tree:
                continue
            tree[key] = VALUES[what]
            if what == "missing":
                del tree[key]
            text = json.dumps(tree, indent=1).replace('"deep"', "[" * 5000 + "]" * 5000)
            if not sealed:
                file.write_text(text)
            else:
                tree.pop("seal")
                body = (json.dumps(tree, indent=1)[:-2].replace('"deep"', "[" * 5000 + "]" * 5000) + ",\n ").encode()
                seal = hashlib.blake2b(body, digest_size=16).hexdigest()
                file.write_bytes(body + f'"seal": "{seal}"\n}}\n'.encode())
            store = opened(data, cache)
            assert whole(store) == expected, (file, key)
            if not sealed:
                assert len(store.mended) == 1 and "manifest.json is not what was written" in store.mended[0]
            assert not opened(data, cache).mended


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", "[" * 100_000, '{"seal": "00000000000000000000000000000000"\n}\n'])
def test_a_manifest_that_is_none_is_compiled_anew(data, cache, text):
    (path,) = cache.glob("store-????????????????")
    for file in (path / MANIFEST, path / "emb_81" / MANIFEST):
        file.write_text(text)
        assert len(opened(data, cache).mended) == 1 and not opened(data, cache).mended


def test_what_killed_builders_left_goes_at_the_next_start(data, cache):
    """Vectors half compiled, of this store, of another one, and in a store that nobody asks for; a living builder's stay."""
    (path,) = cache.glob("store-????????????????")
    other = cache / "store-0123456789abcdef"
    for folder in (path / "emb_82.tmp-7", other / "emb_81.tmp-9", path / "emb_81.tmp-broken-1"):
        folder.mkdir(parents=True)
        (folder / "rows.tmp").write_text("x")
    (path / "verified.json").touch()
    held = cache / "store-00000000000000aa"
    (held / "emb_81.tmp-3").mkdir(parents=True)
    import fcntl

    with open(f"{held}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert opened(data, cache).cache_hit
    assert [str(found.relative_to(cache)) for found in cache.rglob("*.tmp-*")] == ["store-00000000000000aa/emb_81.tmp-3"]
    assert opened(data, cache).cache_hit and not list(cache.rglob("*.tmp-*"))


def test_a_warm_start_of_a_large_store_is_quick(data, cache):
    """A look at each file, whatever its size: a file of 2 GB (of zeros that take no room) that is noted."""
    (path,) = cache.glob("store-????????????????")
    manifest = read_sealed(path / MANIFEST)
    with open(path / "large.bin", "wb") as file:
        file.truncate(2 << 30)
    manifest.pop("seal")
    manifest["files"]["large.bin"] = [2 << 30, "0" * 32]
    seal = write_sealed(path / MANIFEST, manifest)
    note(path, manifest["files"], seal)
    begin = time.monotonic()
    assert opened(data, cache).cache_hit and time.monotonic() - begin < 2
    assert np.asarray(opened(data, cache).user_offsets)[0] == 0
