"""The store: raw data compiled once into memory-mapped columns in the cache, and opened from there ever after.

Finds, locks and maps; store_build.py compiles, store_check.py tells whether files are still those that were compiled. Must not know of
batches, models or settings.
Layout of the cache: store-<fingerprint>/ with manifest.json, verified.json and flat files; emb_<id>/ inside, added later;
store-<fingerprint>.lock and .rejects.jsonl beside it. A folder gets its name when it is whole, so a store is there or not there, never
half; one that was damaged later is compiled anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from atomic import probe
from columns import EmbeddingColumn, ItemLookup, RaggedColumn, StringColumn
from errors import SMALL_FILE_BYTES, UserError, disk_full
from multimodal import compile_embedding, find_embedding, required_embedding
from schema import Feature, Schema
from sources import Rejects, Source, find_source
from store_build import StoreBuilder
from store_check import MANIFEST, DamageError, StaleError, measure, note, verified, write_sealed
from store_files import array_bytes, array_path, digest, file_facts, load_array, sync_path

STORE_VERSION = 2  # of the files' form; another one compiles anew
KINDS = ("train", "predict")

__all__ = [
    "EmbeddingColumn",
    "RaggedColumn",
    "Rejects",
    "Store",
    "StringColumn",
    "content_hash",
    "has_embedding",
    "is_compiled",
    "open_store",
]


class Store:
    """A data set as read-only arrays. Open one with `open_store`.

    path, manifest, schema, kind; cache_hit: it was found, not compiled; summary: what was read, rejected and why.
    mended: what of it was damaged in the cache and is compiled anew, a line each.
    num_users U, num_items (appended ones included), num_known_items, num_events E.
    user_offsets (U+1) int64; item_ids (E) int32 in 1..num_items; action_types (E) int8; timestamps (E) int64, seconds (positions where
    has_time is false); user_ids (U) int64, 0 = unknown in training.
    item_single (num_items+1, F) int32 and user_single (U, F) int32, columns in the schema's order;
    item_multi, user_multi {id: RaggedColumn}.
    cardinalities {feature id: largest value}; raw_item_ids (num_items+1) uint64 or StringColumn; raw_user_ids StringColumn (U).
    Predict only: candidate_item_ids (C) int32, retrieval_ids (C) uint64.
    """

    def __init__(self, path: Path, manifest: dict, data_path: Path, *, cache_hit: bool) -> None:
        self.path, self.manifest, self.cache_hit = path, manifest, cache_hit
        self.data_path, self.mended = Path(data_path), list[str]()
        self.kind: str = manifest["kind"]
        self.schema = Schema.from_dict(manifest["schema"])
        self.summary: dict = manifest["summary"]
        self.cardinalities: dict[str, int] = manifest["cardinalities"]
        self.num_users, self.num_items, self.num_known_items, self.num_events = (
            manifest["counts"][k] for k in ("num_users", "num_items", "num_known_items", "num_events"))  # fmt: skip
        arrays = {name: load_array(path, name, spec) for name, spec in manifest["arrays"].items()}
        self._arrays = arrays
        self.user_offsets, self.user_ids = arrays["user_offsets"], arrays["user_ids"]
        self.item_ids, self.action_types, self.timestamps = arrays["item_ids"], arrays["action_types"], arrays["timestamps"]
        self.item_single, self.user_single = arrays["item_single"], arrays["user_single"]
        self.item_multi, self.user_multi = self._multi("item"), self._multi("user")
        self.raw_user_ids = StringColumn(arrays["raw_user_ids.offsets"], arrays["raw_user_ids.data"])
        self.raw_item_ids: np.ndarray | StringColumn = arrays.get("raw_item_ids")
        if self.raw_item_ids is None:
            self.raw_item_ids = StringColumn(arrays["raw_item_ids.offsets"], arrays["raw_item_ids.data"])
        if self.kind == "predict":
            self.candidate_item_ids, self.retrieval_ids = arrays["candidate_item_ids"], arrays["retrieval_ids"]
        self._lookup: ItemLookup | None = None
        self._embeddings: dict[str, EmbeddingColumn] = {}

    def _multi(self, side: str) -> dict[str, RaggedColumn]:
        names = [f.id for f in self.schema.select(side, "multi")]
        return {name: RaggedColumn(*(self._arrays[f"{side}_multi.{name}.{part}"] for part in RaggedColumn._fields)) for name in names}

    def item_ids_of(self, creative_ids: Sequence[int | str]) -> np.ndarray:
        """(N) creative ids, ints or strings -> (N) int64 item ids, 0 where the store has no such item."""
        if self._lookup is None:
            self._lookup = ItemLookup(self.raw_item_ids)
        return self._lookup(creative_ids)

    def has_embedding(self, feature_id: str) -> bool:
        """Whether the data folder has the vectors of this feature."""
        return feature_id in self.schema and has_embedding(self.data_path, self.schema[feature_id])

    def embedding(self, feature_id: str) -> EmbeddingColumn:
        """The vectors of a feature that was named when the store was opened; UserError for another."""
        if feature_id not in self._embeddings:
            raise UserError(f"embedding {feature_id!r} was not opened with this store; opened: {', '.join(self._embeddings) or 'none'}.\n"
                            "Name it in multimodal_features (--mm_emb_id).")  # fmt: skip
        return self._embeddings[feature_id]

    def _map_embedding(self, feature_id: str) -> None:
        folder = _embedding_folder(self.path, feature_id)
        try:
            arrays = [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ("row_of_item", "matrix")]
        except (ValueError, EOFError, OSError) as error:  # changed since it was verified
            raise UserError(f"{folder}: not the vectors that were compiled: {error}\nRemove this folder; it is made anew.") from None
        self._embeddings[feature_id] = EmbeddingColumn(*arrays)


def open_store(data_path: str | Path, cache_path: str | Path, *, kind: str = "train", embeddings: Sequence[str] = (),
               max_bad_lines: int = 0, progress: bool = True, log: Callable[[str], None] = print,
               verify_all: bool = False) -> Store:  # fmt: skip
    """Open the store of a data folder, compiling it first where the cache has none, or one whose files are not what was compiled.

    data_path: a folder in layout A or B (formats.md); with kind "predict", EVAL_DATA_PATH. embeddings: feature ids to compile and map.
    max_bad_lines: how many lines or rows may be rejected. progress: a bar or plain lines through `log`. verify_all: hash every file, also
    those that were verified before and look unchanged.
    Errors: UserError for data that cannot be read, an unknown or absent embedding, a cache that cannot be written;
    RunError for a full disk.
    """
    assert kind in KINDS, kind
    source = find_source(Path(data_path), kind)
    features = [
        required_embedding(source.schema, str(i), lambda k: has_embedding(source.data_path, source.schema[k]), str(source.data_path))
        for i in embeddings
    ]
    cache = _writable(Path(cache_path))
    fingerprint = _fingerprint(source, max_bad_lines)
    path = cache / f"store-{fingerprint}"
    store = None if verify_all else _or_none(_checked_store, path, fingerprint, source.data_path, hashing=False)
    if store is None:
        with _lock(path.with_suffix(".lock"), log):
            damage = ""
            try:  # another process may have built or verified it meanwhile
                store = _checked_store(path, fingerprint, source.data_path, everything=verify_all)
            except DamageError as error:
                damage = f"store {path.name}: {error}; compiling it anew" if path.exists() else ""
            if store is None:
                if damage:
                    log(damage)
                _sweep(cache, path.name)
                manifest = _build(source, path, fingerprint, max_bad_lines, progress=progress, log=log)
                store = Store(path, manifest, source.data_path, cache_hit=False)
                store.mended += [damage] if damage else []
    _sweep(cache)  # a builder may have died between naming its store and removing its scratch folder
    for feature in features:
        _add_embedding(store, feature, max_bad_lines, progress=progress, log=log, verify_all=verify_all)
        store._map_embedding(feature.id)
    return store


def is_compiled(data_path: str | Path, cache_path: str | Path, *, embeddings: Sequence[str] = (), max_bad_lines: int = 0) -> bool:
    """Whether open_store would find the store of a data folder for training, and these embeddings, in the cache, and write nothing."""
    source = find_source(Path(data_path), "train")
    fingerprint = _fingerprint(source, max_bad_lines)
    path = Path(cache_path) / f"store-{fingerprint}"
    found = {i: find_embedding(source.data_path, source.schema[i]) for i in embeddings}
    if None in found.values():
        return False
    try:
        _checked_store(path, fingerprint, source.data_path)
        for i, vectors in found.items():
            facts = file_facts(vectors.files, source.data_path)
            verified(_embedding_folder(path, i), {"fingerprint": _embedding_fingerprint(facts, source.schema[i], max_bad_lines)})
    except DamageError:
        return False
    return True


def fingerprint_of(data_path: str | Path, max_bad_lines: int = 0) -> str:
    """The fingerprint that open_store's store of a data folder for training has; compiles nothing. It depends on the files' times too."""
    return _fingerprint(find_source(Path(data_path), "train"), max_bad_lines)


def _fingerprint(source: Source, max_bad_lines: int) -> str:
    facts = file_facts(source.files, source.data_path)
    return digest([STORE_VERSION, source.kind, source.layout, source.schema.to_dict(), facts, max_bad_lines])


def _embedding_fingerprint(facts: list, feature: Feature, max_bad_lines: int) -> str:
    """facts: file_facts of the vectors' files."""
    return digest([STORE_VERSION, facts, feature.width, max_bad_lines])


def has_embedding(data_path: str | Path, feature: Feature) -> bool:
    """Whether a data folder has the vectors of a feature."""
    return feature.kind == "embedding" and find_embedding(Path(data_path), feature) is not None


def content_hash(store: Store) -> str:
    """A hash of all arrays, embeddings apart: equal for equal data, whatever its layout."""
    total = hashlib.blake2b(digest_size=16)
    for name, spec in sorted(store.manifest["arrays"].items()):
        total.update(f"{name} {spec['dtype']} {spec['shape']}\n".encode())
        if array_bytes(spec):
            with open(array_path(store.path, name), "rb") as file:
                while piece := file.read(1 << 22):
                    total.update(piece)
    return total.hexdigest()


def _writable(cache: Path) -> Path:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        probe(cache)
    except OSError as error:
        if known := disk_full(error, cache, SMALL_FILE_BYTES):
            raise known from None
        raise UserError(
            f"cache_path {cache}: cannot be written: {error.strerror}.\nGive a writable folder: --cache_path or USER_CACHE_PATH."
        ) from None
    return cache.resolve()


def _checked_store(path: Path, fingerprint: str, data_path: Path, **how: bool) -> Store | None:
    """The store at a path, if its files are those that were compiled; `how` and None: see `verified`. DamageError where they are not."""
    try:
        manifest = verified(path, {"version": STORE_VERSION, "fingerprint": fingerprint}, **how)
        if manifest is None:
            return None
        if not all(isinstance(manifest[key], dict) for key in ("schema", "summary", "cardinalities", "counts", "arrays")):
            raise TypeError("expected objects")
        return Store(path, manifest, data_path, cache_hit=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # sealed by another hand, or changed just now
        raise DamageError(f"{MANIFEST} does not fit its files ({type(error).__name__}: {error})") from None


def _or_none(check: Callable, *args: object, **how: object) -> object | None:
    """What a check returns; None where it finds damage."""
    try:
        return check(*args, **how)
    except DamageError:
        return None


@contextmanager
def _lock(path: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Hold the store's lock. The kernel lets go of it when a process dies, so none is ever stale."""
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"another process is compiling or verifying {path.stem}; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(cache: Path, own: str = "") -> None:
    """Remove what dead builders left of stores and vectors: of the store `own`, whose lock is ours, and of others that nobody holds."""
    for folder in [*cache.glob("store-*.tmp-*"), *cache.glob("store-*/emb_*.tmp-*")]:
        owner = (folder.name if folder.parent == cache else folder.parent.name).split(".tmp-")[0]
        if owner == own:
            shutil.rmtree(folder, ignore_errors=True)
            continue
        with open(cache / f"{owner}.lock", "a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # its builder is alive
            shutil.rmtree(folder, ignore_errors=True)


def _build(source: Source, path: Path, fingerprint: str, max_bad_lines: int, *, progress: bool, log: Callable[[str], None]) -> dict:
    """Compile into a temporary folder, have the disk hold it, and give it its name. Returns the manifest."""
    size = sum(p.stat().st_size for p in source.files)
    log(f"compiling {source.data_path} (layout {source.layout}, {size / 1e6:,.1f} MB) into {path}")
    rejects = Rejects(max_bad_lines, path.with_suffix(".rejects.jsonl"), kind=source.kind)
    rejects.path.unlink(missing_ok=True)
    folder = path.with_name(f"{path.name}.tmp-{os.getpid()}-{time.time_ns()}")
    scratch = folder.with_name(folder.name + "-scratch")
    builder = None
    try:
        folder.mkdir()
        scratch.mkdir()
        builder = StoreBuilder(source, folder, scratch, rejects, progress=progress, log=log)
        manifest = {"version": STORE_VERSION, "fingerprint": fingerprint, "kind": source.kind, "layout": source.layout,
                    "schema": source.schema.to_dict(), "sources": file_facts(source.files, source.data_path)} | builder.build()  # fmt: skip
        names = [array_path(folder, name).name for name, spec in manifest["arrays"].items() if array_bytes(spec)]
        manifest["files"] = measure(folder, names)
        manifest["seal"] = write_sealed(folder / MANIFEST, manifest)
        note(folder, names, manifest["seal"])
        sync_path(folder)
        _replace(folder, path)
    except OSError as error:
        if known := disk_full(error, path, size if source.layout == "B" else size // 4):
            raise known from None
        raise
    finally:
        if rejects.path.exists():
            log(f"{rejects.count:,} lines or rows rejected; listed in {rejects.path}")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(scratch, ignore_errors=True)
    _report(manifest["summary"], log)
    return manifest


def _replace(folder: Path, path: Path) -> None:
    """Rename `folder` to `path`; what was there, a broken one, goes."""
    if path.exists():
        broken = path.with_name(f"{path.name}.tmp-broken-{time.time_ns()}")
        path.rename(broken)
        shutil.rmtree(broken, ignore_errors=True)
    folder.rename(path)
    sync_path(path.parent)


def _report(summary: dict, log: Callable[[str], None]) -> None:
    """Say what was read, and all that was not taken as it stands."""
    log(f"store: {summary['num_users']:,} users, {summary['num_items']:,} items, {summary['num_events']:,} events, "
        f"{summary['rejected']:,} rejected, {summary['store_bytes'] / 1e6:,.1f} MB, compiled in {summary['seconds']:.1f} s")  # fmt: skip
    for group in ("cold", "coerced", "ignored", "missing", "differences"):
        for what, count in summary[group].items():
            log(f"  {group}: {what}: {count:,}")
    for what, count in summary["candidates"].items():
        if not what.startswith("read"):
            log(f"  candidates: {what}: {count:,}")
    for warning in summary["warnings"]:
        log(f"  warning: {warning}")


def _embedding_folder(path: Path, feature_id: str) -> Path:
    return path / f"emb_{feature_id}"


def _add_embedding(store: Store, feature: Feature, max_bad_lines: int, *, progress: bool, log: Callable[[str], None],
                   verify_all: bool) -> None:  # fmt: skip
    """Compile the vectors of one feature into the store's folder, where they are missing, damaged or of another source."""
    source = find_embedding(store.data_path, feature)
    facts = file_facts(source.files, store.data_path)
    fingerprint = _embedding_fingerprint(facts, feature, max_bad_lines)
    folder = _embedding_folder(store.path, feature.id)
    if not verify_all and _or_none(verified, folder, {"fingerprint": fingerprint}, hashing=False):
        return
    with _lock(store.path.with_suffix(".lock"), log):
        try:
            verified(folder, {"fingerprint": fingerprint}, everything=verify_all)
            return
        except StaleError:
            pass  # other vectors are in the data folder now
        except DamageError as error:
            if folder.exists():
                store.mended.append(f"embedding {feature.id}: {error}; compiling it anew")
                log(store.mended[-1])
        _sweep(store.path.parent, store.path.name)
        temporary = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
        rejects = Rejects(max_bad_lines, store.path.with_suffix(f".emb_{feature.id}.rejects.jsonl"), kind=store.kind)
        rejects.path.unlink(missing_ok=True)
        try:
            temporary.mkdir()
            counts = compile_embedding(source, feature, store.item_ids_of, store.num_items, temporary, max_bad_lines=max_bad_lines,
                                       rejects=rejects, progress=progress)  # fmt: skip
            names = [p.name for p in temporary.glob("*.npy")]
            for name in names:
                sync_path(temporary / name)
            manifest = {"fingerprint": fingerprint, "sources": facts, "files": measure(temporary, names), "counts": counts}
            note(temporary, names, write_sealed(temporary / MANIFEST, manifest))
            sync_path(temporary)
            _replace(temporary, folder)
        except OSError as error:
            if known := disk_full(error, folder, 2 * feature.width * store.num_items):
                raise known from None
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        log(f"embedding {feature.id}: " + ", ".join(f"{v:,} {k}" for k, v in counts.items() if isinstance(v, int)))
