"""The one reader of pickles: plain containers, text, numbers and numpy arrays of plain dtype, nothing else.

Must not import, look up or call anything that a file names. No other module may unpickle.

Nothing a file can name is handed out as the real object. The few globals that plain data needs are answered with inert stand-ins:
they have no attributes to reach through, take no state, and never let numpy see a dtype or a shape that was not checked here
(numpy's own dtype state can be forged into an array of object pointers, which is as good as running code).
"""

from __future__ import annotations

import gc
import math
import pickle
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from errors import UserError

EXPECTED = "Expected dicts, lists, tuples, sets, str, bytes, int, float, bool, None and numpy arrays of numbers or text only."
FREE_BYTES, MAX_GROWTH = 1 << 30, 200  # an empty dict is one byte in the file and 64 in memory
# bool, int, uint, float, complex with their size in bytes; fixed-width bytes and text. Neither object nor void nor time.
_PLAIN_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f(2|4|8|12|16)|c(8|16|24|32)|[SU][0-9]{1,9})")


class Refused(pickle.UnpicklingError):
    """Something other than plain data was asked for; the message says what."""


class _StandIn:
    """A callable without attributes that answers for one global; a pickle can only call it or pass it on."""

    __slots__ = ("_answer",)

    def __init__(self, answer: Callable[..., Any]) -> None:
        self._answer = answer

    def __call__(self, *args: Any) -> Any:
        return self._answer(*args)

    def __setstate__(self, state: object) -> NoReturn:
        raise Refused("a state for a function")


class _Dtype:
    """A plain numpy dtype under construction; numpy's own never lies on a pickle's stack."""

    __slots__ = ("real",)

    def __init__(self, code: object, *_: object) -> None:
        if not isinstance(code, str) or not _PLAIN_DTYPE.fullmatch(code):
            raise Refused(f"numpy dtype {str(code)[:40]!r}")
        try:
            self.real = np.dtype(code)
        except TypeError:
            raise Refused(f"numpy dtype {code!r}") from None

    def __setstate__(self, state: object) -> None:
        # (version, byte order, subarray, names, fields, item size, alignment, flags): only the byte order may say anything new.
        if not isinstance(state, tuple) or len(state) < 5 or state[1] not in ("<", ">", "|", "=") or state[2:5] != (None, None, None):
            raise Refused("a structured numpy dtype")
        if state[1] in ("<", ">"):
            self.real = self.real.newbyteorder(state[1])


class _Array(np.ndarray):
    """An array whose state is checked before numpy fills it; behaves as its base class in every other way."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise Refused("a numpy array of unknown form")
        _, shape, dtype, is_fortran, raw = state
        real = _checked(dtype, shape, raw)
        super().__setstate__((1, shape, real, bool(is_fortran), raw))


def _checked(dtype: object, shape: object, raw: object) -> np.dtype:
    """The real dtype, once shape and bytes are known to agree with it."""
    if type(dtype) is not _Dtype or type(raw) is not bytes and type(raw) is not bytearray:
        raise Refused("a numpy array of Python objects")
    if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
        raise Refused("a numpy array of impossible shape")
    if math.prod(shape) * dtype.real.itemsize != len(raw):
        raise Refused(f"a numpy array of {len(raw)} bytes that should have {math.prod(shape) * dtype.real.itemsize}")
    return dtype.real


def _reconstruct(kind: object, *_: object) -> np.ndarray:
    if kind is not _NDARRAY:
        raise Refused("a numpy array of another class")
    return np.ndarray.__new__(_Array, (0,), np.int8)


def _from_buffer(raw: object, dtype: object, shape: object, order: object) -> np.ndarray:
    if order not in ("C", "F"):
        raise Refused("a numpy array of unknown order")
    real = _checked(dtype, shape, raw)
    return np.frombuffer(raw, dtype=real).reshape(shape, order=order)


def _scalar(dtype: object, raw: object) -> object:
    return np.frombuffer(raw, dtype=_checked(dtype, (), raw))[0]


def _latin1(text: object, encoding: object) -> bytes:
    # How protocols 0 to 2 spell bytes; any other codec would be looked up by name.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Refused(f"the codec {str(encoding)[:40]!r}")
    return text.encode("latin-1")


def _class_itself(*_: object) -> NoReturn:
    raise Refused("numpy.ndarray called by itself")


_NDARRAY = _StandIn(_class_itself)
_ALLOWED: dict[tuple[str, str], _StandIn] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _StandIn(_Dtype),
    ("_codecs", "encode"): _StandIn(_latin1),
}
for _core in ("numpy.core", "numpy._core"):  # before and since numpy 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _StandIn(_reconstruct)
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _StandIn(_scalar)
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _StandIn(_from_buffer)
for _builtins in ("builtins", "__builtin__"):  # protocols 3, and 0 to 2
    _ALLOWED[_builtins, "set"] = _StandIn(lambda values=(): set(values))
    _ALLOWED[_builtins, "frozenset"] = _StandIn(lambda values=(): frozenset(values))
    _ALLOWED[_builtins, "bytes"] = _StandIn(lambda: b"")  # how protocols 0 to 2 spell empty bytes
    _ALLOWED[_builtins, "complex"] = _StandIn(lambda real, imag: complex(real, imag))


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _StandIn:
        stand_in = _ALLOWED.get((module, name))
        if stand_in is None:
            raise Refused(f"the global {f'{module}.{name}'[:120]!r}")
        return stand_in

    def persistent_load(self, pid: object) -> NoReturn:
        raise Refused("a persistent id")


@contextmanager
def _bounded_memory(file_size: int) -> Iterator[None]:
    """Keep a forged index or length from eating the machine: the C unpickler fills a table as long as the index it is told.

    Lowers the process's limit on address space meanwhile, to what is in use plus far more than plain data of that size can need.
    """
    try:
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError):  # not Linux
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    ceilings = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min([in_use + FREE_BYTES + MAX_GROWTH * file_size, *ceilings]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def load_plain_pickle(path: str | Path) -> Any:
    """Read a pickle that holds plain data only, at the speed of the C unpickler.

    path: the file. Arrays may come back as a subclass of numpy.ndarray that adds nothing.
    Result: the object. Dict order is the file's.
    Errors: UserError when the file is missing, when it asks for anything but plain data (the message names what was refused; nothing
    of it has run), when it is truncated or no pickle, or when bytes follow the pickle.
    """
    path = Path(path)
    # A million small objects are traced again and again for cycles that plain data cannot form in the reader: 2-3 times slower.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with open(path, "rb") as file, _bounded_memory(path.stat().st_size):
            value = _PlainUnpickler(file).load()
            left = file.read(1)
    except Refused as error:
        raise UserError(f"{path}: refused {error} in this pickle; nothing of it was run.\n{EXPECTED}\n"
                        "Do not trust this file; get it again from its source.") from None  # fmt: skip
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; expected a pickle file.") from None
    except OSError:
        raise
    except MemoryError:
        raise UserError(f"{path}: asks for far more memory than {path.stat().st_size:,} bytes of plain data can need.\n"
                        "The file is damaged or was made to do harm; get it again from its source.") from None  # fmt: skip
    except Exception as error:  # damage shows as almost any exception: EOF, Unicode, memory (a forged length), index, type ...
        raise UserError(f"{path}: not a readable pickle ({type(error).__name__}: {str(error)[:120]}).\n"
                        "The file is damaged or cut short; get it again from its source.") from None  # fmt: skip
    finally:
        if was_enabled:
            gc.enable()
    if left:
        raise UserError(f"{path}: more bytes follow the end of the pickle; expected one object and the end of the file.")
    return value
