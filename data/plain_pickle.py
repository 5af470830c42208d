"""Reading pickles from strangers: plain data is rebuilt, and nothing that they name is imported or called."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np


class RefusedError(Exception):
    """A pickle asks for something that is not plain data; the message names it."""


def load_plain(data: bytes) -> Any:
    """Unpickle lists, tuples, bytes, numbers and plain numpy arrays; strings of Python 2 come back as bytes.

    Raises RefusedError where the pickle asks for anything else, and whatever pickle raises where it is damaged.
    """
    for opcode, argument, _ in pickletools.genops(data):  # which allocates nothing that the data do not hold
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise RefusedError(f"a table of {argument} entries")
    return _finished(_PlainUnpickler(io.BytesIO(data), encoding="bytes").load())


class _Dtype:
    """Stands in for a numpy.dtype, whose own state could turn bytes into pointers to objects."""

    def __init__(self, name: str | bytes, *_: object) -> None:
        self.dtype = np.dtype(name.decode("ascii") if isinstance(name, bytes) else name)
        if self.dtype.kind not in "biufSO":
            raise RefusedError(f"numpy arrays of {self.dtype}")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


class _Array:
    """Stands in for a numpy.ndarray until its content is there."""

    def __init__(self, *_: object) -> None:
        self.array: np.ndarray = np.empty(0, dtype=np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.dtype.kind == "O":
            self.array = np.empty(len(content), dtype=object)
            self.array[:] = content
        else:
            self.array = _buffer(content, dtype, shape, "F" if fortran else "C")


def _buffer(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(content, dtype=dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype=dtype.dtype)[0]


def _bytes(text: str | bytes = b"", *_: object) -> bytes:
    return text.encode("latin1") if isinstance(text, str) else text  # bytes in protocols up to 2


def _finished(value: Any) -> Any:
    """The value with arrays where stand-ins are."""
    if isinstance(value, _Array):
        return _finished(value.array.tolist()) if value.array.dtype == object else value.array
    if isinstance(value, list | tuple):
        return type(value)(_finished(part) for part in value)
    return value


def _plain_names() -> dict[tuple[str, str], Callable[..., Any]]:
    names: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _bytes,
        ("__builtin__", "bytes"): _bytes,
        ("builtins", "bytes"): _bytes,
    }
    for core in ("numpy.core", "numpy._core"):  # NumPy 1 and NumPy 2
        names[f"{core}.multiarray", "_reconstruct"] = _Array
        names[f"{core}.multiarray", "scalar"] = _scalar
        names[f"{core}.numeric", "_frombuffer"] = _buffer
    return names


class _Callable:
    """What a pickle gets for a name: made anew each time, so that attributes it may set are gone with it."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _PlainUnpickler(pickle.Unpickler):
    """Replaces every name that a pickle may ask for by a stand-in of this module."""

    _names = _plain_names()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _Callable(self._names[module, name])
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None
