"""Checkpoints on disk: written so that a crash at any moment leaves the old or the new one, verified before they are read.

Must not know models, optimisers or settings: it stores tensors and plain values.
One process writes to a folder of checkpoints at a time (runs.py sees to it); any number may read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from atomic import TEMPORARY, fsync_folder, or_disk_full, unused
from checkpoint_meta import SHAPE as META_SHAPE
from errors import ForeignFormatError, RunError, UserError
from shapes import fault

FORMAT_VERSION = 2
MODEL, TRAINER, META = "model.pt", "trainer.pt", "meta.json"
REPLACED, SET_ASIDE = ".old-", "damaged-"
LINK_NAME = re.compile(r"(best_model|checkpoint_epoch_\d+)\.pt")  # other .pt files in the folder are the user's
_NAME = re.compile(r"global_step(\d+)(?:\.valid_loss=.*)?")
_SEAL = re.compile(rb'"meta_sha256": "([0-9a-f]{64})"\n}\n\Z')
_READ_BYTES = 1 << 22
_META_BYTES = 1 << 26


class Checkpoint(NamedTuple):
    """A checkpoint that was read: its folder, the model's tensors, the trainer's state (None when not asked for), meta.json."""

    path: Path
    model_state: dict[str, Tensor]
    trainer_state: dict | None
    meta: dict


def plain_json(value: Any) -> Any:
    """`value` as JSON can hold it: paths become strings, 0-d tensors and numpy scalars numbers, numbers that are not finite null.

    null, as strict readers refuse NaN. TypeError for anything else that JSON does not know.
    """
    if isinstance(value, dict):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"JSON cannot hold a {type(value).__name__}: {value!r:.80}")


# ---- saving -------------------------------------------------------------------------------------------------------------


class _HashingFile:
    """A file that hashes what is written to it, so that gigabytes are not read again.

    An error is kept and the rest is swallowed: torch's zip writer must not be left by an exception (its destructor writes).
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.size = file, hashlib.sha256(), 0
        self.error: BaseException | None = None

    def write(self, data: bytes | memoryview) -> int:
        num_bytes = memoryview(data).nbytes
        if self.error is None:
            try:
                self._file.write(data)
                self._hash.update(data)
                self.size += num_bytes
            except BaseException as error:  # a KeyboardInterrupt here is kept and raised by the caller too
                self.error = error
        return num_bytes

    def flush(self) -> None:
        if self.error is None:
            try:
                self._file.flush()
            except BaseException as error:
                self.error = error

    def seal(self) -> dict:
        return {"sha256": self._hash.hexdigest(), "size": self.size}


def _write_tensors(path: Path, state: dict) -> dict:
    """torch.save with hash and fsync; returns {"sha256", "size"} of the file."""
    with open(path, "wb") as file:
        writer = _HashingFile(file)
        torch.save(state, writer)
        if writer.error is not None:
            raise writer.error
        file.flush()
        os.fsync(file.fileno())
    return writer.seal()


def _storable(value: Any, where: str) -> Any:
    """`value` with its tensors on the CPU and without views of larger storages; CPU tensors are not copied.

    TypeError (a programming mistake) names the place of a value that weights_only=True would refuse.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        # torch.save writes a tensor's whole storage: a slice of a table would drag the table along.
        return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
    if isinstance(value, dict):
        wrong = next((key for key in value if type(key) not in (str, int)), None)
        if wrong is not None:
            raise TypeError(f"{where}: a key is {wrong!r}; a checkpoint holds str and int keys only")
        return {key: _storable(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_storable(item, f"{where}[{n}]") for n, item in enumerate(value))
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors, numbers, str, bool, None, lists and dicts only")


def _num_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return 64 + sum(map(_num_bytes, items))


def _meta_text(meta: dict) -> str:
    """meta.json's text; its last line is the sha256 of the text with that hash written as 64 zeros: a flip anywhere shows."""
    body = {key: value for key, value in plain_json(meta).items() if key != "meta_sha256"} | {"meta_sha256": "0" * 64}
    text = json.dumps(body, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    return text[: -len("0" * 64 + '"\n}\n')] + hashlib.sha256(text.encode()).hexdigest() + '"\n}\n'


def checkpoint_name(step: int, valid_loss: float | None) -> str:
    """The folder's name; a loss that is None or not a number reads "nan"."""
    return f"global_step{step}.valid_loss={math.nan if valid_loss is None else valid_loss:.4f}"


def is_checkpoint_name(name: str) -> bool:
    """Whether it is a folder's name that checkpoint_name may have made: no path to anywhere else."""
    return bool(_NAME.fullmatch(name)) and "/" not in name and "\0" not in name


def save_checkpoint(
    root: Path, *, step: int, valid_loss: float | None, model_state: dict[str, Tensor], trainer_state: dict, meta: dict
) -> Path:
    """Write a checkpoint folder under `root`; returns its path.

    step: updates done; valid_loss: of this step, None where it is not known (an earlier save of the same weights may tell it).
    model_state: name -> tensor on any device; trainer_state: nested plain values and tensors; meta: JSON, with checkpoint_meta.py's keys.
    The folder appears by one rename after everything in it is on the disk. A checkpoint of the same step is replaced.
    RunError when the disk is full: earlier checkpoints are whole then, and nothing temporary stays.
    """
    wrong = [name for name, value in model_state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f"model_state holds tensors only; {wrong[0]!r} is a {type(model_state[wrong[0]]).__name__}")
    parts = {MODEL: _storable(dict(model_state), "model_state"), TRAINER: _storable(trainer_state, "trainer_state")}
    root = Path(root)
    final = root / checkpoint_name(step, valid_loss)
    temporary = root / f"{TEMPORARY}global_step{step}-{os.getpid()}"
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        files = {name: _write_tensors(temporary / name, state) for name, state in parts.items()}
        loss = _known_loss(root, step, files[MODEL]) if valid_loss is None else float(valid_loss)
        final = root / checkpoint_name(step, loss)
        sealed = dict(meta) | {"format_version": FORMAT_VERSION, "step": step, "valid_loss": loss, "files": files}
        if wrong := fault(plain_json(sealed), META_SHAPE):
            raise TypeError(f"meta: {wrong}")
        with open(temporary / META, "wb") as file:
            file.write(_meta_text(sealed).encode())
            file.flush()
            os.fsync(file.fileno())
        fsync_folder(temporary)
        _put_in_place(root, temporary, final, step)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # what fails here is finished by the next save or start
            _finish_replacements(root)
        raise or_disk_full(error, final, _num_bytes(parts)) from None
    return final


def _known_loss(root: Path, step: int, model_file: dict) -> float | None:
    """The loss that an earlier checkpoint of this step noted for the very same weights: a save at a signal must not forget it."""
    for path in [path for path in list_checkpoints(root) if _step(path) == step]:
        with contextlib.suppress(UserError):  # a damaged one is about to be replaced
            meta = read_meta(path)
            if meta["files"][MODEL] == model_file:
                return meta.get("valid_loss")
    return None


def _put_in_place(root: Path, temporary: Path, final: Path, step: int) -> None:
    """Rename the finished folder to its name; an older one of the same step steps aside first and is removed after.

    Between the two renames the old one is found under its name of REPLACED (list_checkpoints looks there), so at every moment
    exactly one folder of the step counts, and a complete one.
    """
    for old in [path for path in list_checkpoints(root) if _step(path) == step and not path.name.startswith(REPLACED)]:
        shutil.rmtree(root / (REPLACED + old.name), ignore_errors=True)
        os.rename(old, root / (REPLACED + old.name))
    os.rename(temporary, final)
    fsync_folder(root)
    _finish_replacements(root)


def _finish_replacements(root: Path) -> None:
    """Complete, or undo, a replacement that a crash cut short."""
    for old in sorted(root.glob(f"{REPLACED}global_step*")):
        successors = [path for path in _folders(root) if _step(path) == _step(old)]
        if not successors:
            os.rename(old, root / old.name.removeprefix(REPLACED))
            continue
        for name in _links_to(root, old):
            link(root, name, successors[-1])
        _remove_folder(root, old)


# ---- finding ------------------------------------------------------------------------------------------------------------


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name.removeprefix(REPLACED))
    return int(match.group(1)) if match else -1


def _folders(root: Path) -> list[Path]:
    """Folders named as checkpoints, by step."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]
    return sorted(found, key=lambda path: (_step(path), path.name))


def list_checkpoints(root: Path) -> list[Path]:
    """The checkpoint folders under `root`, oldest step first, not verified; one that a cut-short replacement left aside counts too."""
    root = Path(root)
    found = _folders(root)
    steps = {_step(path) for path in found}
    found += [path for path in root.glob(f"{REPLACED}global_step*") if path.is_dir() and _step(path) not in steps]
    return sorted(found, key=_step)


def newest_valid(root: Path, log: Callable[[str], None] = print) -> Path | None:
    """The checkpoint of the highest step whose files are all there with the right hashes; None without one.

    log: is told each damaged one that was passed over, with the reason. UserError where one cannot be read (a disk that fails, no
    permission) or is of another format: it may be whole, and a run must not go on from before it.
    """
    for path in reversed(list_checkpoints(root)):
        try:
            verify(path, (MODEL, TRAINER))
            return path
        except ForeignFormatError:
            raise
        except UserError as error:
            log(f"damaged checkpoint passed over: {' '.join(str(error).split())}")
        except OSError as error:
            raise UserError(
                f"{error.filename or path}: cannot be read: {error.strerror}. It may be whole: mend that, or move {path.name} away."
            ) from None
    return None


def find_checkpoint(path: Path) -> Path:
    """The checkpoint folder meant by a folder, a model.pt in it, or a link beside it such as best_model.pt.

    A hard link is known by its inode, a copy by the sha256 in meta.json. UserError says what else was found.
    """
    path = Path(path)
    if path.is_dir():
        if (path / META).is_file() or (path / TRAINER).is_file():  # this project's, whatever it has lost
            return path
        if (path / MODEL).is_file():
            raise UserError(_bare_weights(path / MODEL))
        inside = list_checkpoints(path)
        hint = "Name a folder global_stepN.valid_loss=X."
        hint = f"It holds {len(inside)} checkpoints; name one, such as {inside[-1]}." if inside else hint
        raise UserError(f"{path}: not a checkpoint: found neither {META} nor {MODEL} in it.\n{hint}")
    if not path.is_file():
        expected = f"a folder global_stepN.valid_loss=X, a {MODEL} in one, or a link such as best_model.pt"
        raise UserError(f"{path}: no such checkpoint. Expected {expected}.")
    if (path.parent / META).is_file() and path.name == MODEL:
        return path.parent
    folder = _folder_of_link(path)
    if folder is None:
        raise UserError(_bare_weights(path))
    return folder


def _folder_of_link(path: Path) -> Path | None:
    folders = list_checkpoints(path.parent)
    for folder in folders:
        if (folder / MODEL).is_file() and os.path.samefile(folder / MODEL, path):
            return folder
    size, digest = path.stat().st_size, None
    for folder in reversed(folders):
        try:
            expected = read_meta(folder)["files"][MODEL]
        except UserError:
            continue  # a damaged folder cannot be the one; newest_valid and load_checkpoint report it
        if expected["size"] == size:
            digest = digest or _sha256(path)
            if expected["sha256"] == digest:
                return folder
    return None


def _bare_weights(path: Path) -> str:
    """Why a .pt without its folder is refused, said as exactly as its zip directory allows: it is not unpickled for that."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]  # below the one folder that torch.save makes
        num_tensors = sum(bool(re.fullmatch(r"data/\d+", name)) for name in names)
        found = "a zip file that torch.save did not write"
        if "data.pkl" in names:
            found = f"looks like a bare state_dict ({num_tensors} tensors, the organisers' layout)"
            found = found if num_tensors else "a file of torch.save without tensors"
        found = "a TorchScript archive" if "constants.pkl" in names else found
    except Exception as error:  # whatever a stranger's file makes the reader raise
        found = f"no zip file of torch.save ({type(error).__name__})"
    return (
        f"{path}: {found} without {META}: the settings and the numbering of ids it was trained with are unknown.\n"
        f"Expected a checkpoint of main.py: a folder with {MODEL} and {META}, or a link in the folder that holds it."
    )


# ---- verifying and loading ----------------------------------------------------------------------------------------------


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_READ_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _verify(path: Path, expected: dict) -> None:
    """UserError unless the file has the size and the sha256 that meta.json gives."""
    advice = "It is damaged: take another checkpoint, or copy this one again."
    if not path.is_file():
        raise UserError(f"{path}: missing; expected {expected['size']:,} bytes. {advice}")
    size = path.stat().st_size
    if size != expected["size"]:
        raise UserError(f"{path}: expected {expected['size']:,} bytes, found {size:,}. {advice}")
    digest = _sha256(path)
    if digest != expected["sha256"]:
        raise UserError(f"{path}: expected sha256 {expected['sha256'][:16]}..., found {digest[:16]}.... {advice}")


def verify(folder: Path, names: Iterable[str]) -> dict:
    """meta.json of a checkpoint folder, after it and the named files were found whole; UserError says what is damaged."""
    meta = read_meta(folder)
    for name in names:
        _verify(Path(folder) / name, meta["files"][name])
    return meta


def evaluated(root: Path, log: Callable[[str], None]) -> Iterator[tuple[Path, dict]]:
    """The checkpoints under `root` of steps that were evaluated, with whole weights, oldest first, each with its meta.json.

    log: is told each damaged one. One of another format, or that cannot be read for the moment, is an error.
    """
    for path in list_checkpoints(root):
        try:
            meta = read_meta(path)
            if meta.get("valid_loss") is not None:
                yield path, verify(path, (MODEL,))
        except ForeignFormatError:
            raise
        except UserError as error:
            log(f"damaged checkpoint passed over: {' '.join(str(error).split())}")


def read_meta(folder: Path) -> dict:
    """meta.json of a checkpoint folder: its own hash fits, every key is there, of its type. UserError when missing or damaged."""
    path = Path(folder) / META
    if not path.is_file():
        raise UserError(f"{path}: missing; a checkpoint folder holds it. Take another checkpoint.")
    if path.stat().st_size > _META_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes; expected at most {_META_BYTES:,}. It is damaged: take another checkpoint.")
    data = path.read_bytes()
    seal = _SEAL.search(data)
    zeroed = b"" if seal is None else data[: seal.start(1)] + b"0" * 64 + data[seal.end(1) :]
    if seal is None or hashlib.sha256(zeroed).hexdigest().encode() != seal.group(1):
        found = "no hash at its end" if seal is None else "other content"
        raise UserError(f"{path}: expected text that fits its meta_sha256, found {found}. Damaged or edited: take another checkpoint.")
    try:
        meta = json.loads(data)
        version = meta.get("format_version")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a checkpoint's {META}: {type(error).__name__}: {error}. Take another checkpoint.") from None
    if type(version) is int and version != FORMAT_VERSION:
        raise ForeignFormatError(
            f"{path}: format_version is {version!r}; expected {FORMAT_VERSION}. Use the version of this project that wrote it."
        )
    if wrong := fault(meta, META_SHAPE):
        raise UserError(f"{path}: {wrong}. Damaged or edited: take another checkpoint.")
    return meta


def _why_refused(text: str) -> str:
    """torch's reason without its advice, which is to load the file without weights_only: that would run a stranger's code."""
    if "TorchScript" in text:
        return "a TorchScript archive"
    if "mmap can only be used" in text:
        return "a form older than torch 1.6, or no checkpoint"
    found = re.search(r"(?:Unsupported|not an allowed) (?:global|class)\S* ?(?:GLOBAL )?(\S+)|WeightsUnpickler error: ([^\n]+)", text)
    if found:
        return f"it holds more than tensors: {(found.group(1) or found.group(2))[:120]}"
    return " ".join(text.split("weights_only", 1)[0].split())[:200]


@contextlib.contextmanager
def fits(path: Path) -> Iterator[None]:
    """Within it, what a checkpoint's file lacks or has of a wrong type is a UserError that names the file: hashes do not tell."""
    try:
        yield
    except (UserError, RunError):
        raise
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"{path}: not what a checkpoint of this project holds ({what}). Take another checkpoint.") from None


def _load_tensors(path: Path, mmap: bool) -> dict:
    try:
        state = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # a stranger's file can make torch raise anything; it never runs its code
        raise UserError(f"{path}: torch refuses to read it as tensors ({type(error).__name__}): {_why_refused(str(error))}") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: expected a dict, found a {type(state).__name__}. Take another checkpoint.")
    return state


def load_checkpoint(path_or_link: Path, *, with_trainer: bool, verify: bool = True) -> Checkpoint:
    """Read a checkpoint: a folder, a model.pt in it, or a link to one.

    with_trainer: read trainer.pt too (only the files that are read are verified). verify: compare sizes and hashes first.
    Tensors are on the CPU; the model's are mapped from the file (privately), to be copied into parameters. The trainer's are read, as an
    optimiser takes them over: a mapping would hold the disk space of a checkpoint that prune removed.
    UserError names the file, what was expected and what was found; nothing is unpickled before the hashes hold.
    """
    folder = find_checkpoint(path_or_link)
    meta = read_meta(folder)
    names = (MODEL, TRAINER) if with_trainer else (MODEL,)
    for name in names if verify else ():
        _verify(folder / name, meta["files"][name])
    states = [_load_tensors(folder / name, mmap=name == MODEL) for name in names]
    wrong = next((name for name, value in states[0].items() if not isinstance(value, Tensor)), None)
    if wrong is not None:
        found = f"{wrong!r} is a {type(states[0][wrong]).__name__}"
        raise UserError(f"{folder / MODEL}: {found}; expected tensors only. Take another checkpoint.")
    return Checkpoint(folder, states[0], states[1] if with_trainer else None, meta)


# ---- links and tidying --------------------------------------------------------------------------------------------------


def link(root: Path, name: str, checkpoint: Path) -> Path:
    """Let root/name be a hard link to the checkpoint's model.pt, atomically; a copy where links are impossible."""
    if not LINK_NAME.fullmatch(name):
        raise ValueError(f"a link is named best_model.pt or checkpoint_epoch_N.pt, not {name!r}")
    target, final = Path(checkpoint) / MODEL, Path(root) / name
    temporary = final.with_name(f"{TEMPORARY}{name}-{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        link_or_copy(target, temporary)
        os.rename(temporary, final)
        fsync_folder(final.parent)
    except BaseException as error:
        raise or_disk_full(error, final, target.stat().st_size) from None
    finally:
        temporary.unlink(missing_ok=True)  # rename does nothing where both names are one file already
    return final


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link where the file system has them, else a copy."""
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EXDEV, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EINVAL):
            raise
        _copy(source, target)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as reader, open(target, "wb") as writer:
        shutil.copyfileobj(reader, writer, _READ_BYTES)
        writer.flush()
        os.fsync(writer.fileno())


def _links_to(root: Path, folder: Path) -> list[str]:
    """Names of the links in root that are the folder's model.pt, by inode, or copies of it, by hash."""
    target = folder / MODEL
    if not target.is_file():
        return []
    try:
        expected = read_meta(folder)["files"][MODEL]
    except UserError:
        expected = {"size": -1, "sha256": ""}  # a damaged folder: links are known by inode still, copies are not
    found = []
    for path in sorted(path for path in root.glob("*.pt") if LINK_NAME.fullmatch(path.name) and path.is_file()):
        stat = path.stat()
        # Only a file that nothing else names can be a copy; hashing it is the price of file systems without links.
        is_copy = stat.st_nlink == 1 and stat.st_size == expected["size"] and _sha256(path) == expected["sha256"]
        if is_copy or os.path.samefile(path, target):
            found.append(path.name)
    return found


def _remove_folder(root: Path, folder: Path) -> None:
    """Remove a checkpoint and the links that name it; it loses its name first, so that a half-removed one never counts."""
    for name in _links_to(root, folder):
        (root / name).unlink()
    doomed = root / f"{TEMPORARY}removed-{folder.name}-{os.getpid()}"
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    fsync_folder(root)  # else a power cut may forget the new name and not what was removed under it
    shutil.rmtree(doomed)


def prune(root: Path, keep_last_k: int, keep: Iterable[Path] = ()) -> list[Path]:
    """Remove all but the `keep_last_k` newest checkpoints (0: keep all) and those in `keep` (folders or links); returns the removed."""
    if keep_last_k < 0:
        raise ValueError(f"keep_last_k is {keep_last_k}; expected 0 (all) or more")
    root = Path(root)
    # A folder is kept as it is named: what is damaged in it must not end the run that makes room for its next checkpoint.
    kept = {(path if path.is_dir() else find_checkpoint(path)).resolve() for path in map(Path, keep) if path.exists()}
    folders = list_checkpoints(root)
    removed = [path for path in folders[: max(len(folders) - keep_last_k, 0) if keep_last_k else 0] if path.resolve() not in kept]
    for path in removed:
        _remove_folder(root, path)
    return removed


def set_aside_newer(root: Path, step: int, log: Callable[[str], None] = print) -> list[Path]:
    """Rename the checkpoints of steps after `step` to damaged-...: a run that goes on from `step` will write its own.

    Left there, a damaged one would count among the newest in prune. Nothing is deleted; `log` is told. Returns the new paths.
    """
    return [set_aside(path, log) for path in list_checkpoints(root) if _step(path) > step]


def set_aside(path: Path, log: Callable[[str], None]) -> Path:
    """Rename a checkpoint to damaged-..., without the links that name it; `log` is told. Returns the new path."""
    target = unused(path.with_name(SET_ASIDE + path.name.removeprefix(REPLACED)))
    for name in _links_to(path.parent, path):
        (path.parent / name).unlink()
    os.rename(path, target)
    log(f"set aside: {path.name} -> {target.name} (remove it when it is of no more use)")
    return target


def clean_temporary(root: Path) -> int:
    """Remove what a killed process left half-written under `root`, and finish its replacements; returns how many were removed.

    Only for the one process that writes there.
    """
    root, count = Path(root), 0
    if not root.is_dir():
        return 0
    _finish_replacements(root)
    for path in sorted(path for path in root.glob(f"{TEMPORARY}*") if re.fullmatch(r".+-\d+", path.name)):
        count += 1
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    return count
