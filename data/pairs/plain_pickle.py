"""Reads untrusted pickles: plain data is rebuilt, and nothing that they name is imported or called."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np

_OPCODES = {opcode.code.encode("latin1"): opcode for opcode in pickletools.opcodes}


class RefusedError(Exception):
    """A pickle asks for something that is not plain data; the message names it."""


def load_plain(data: bytes) -> Any:
    """Unpickle lists, tuples, bytes, numbers and plain numpy arrays; strings of Python 2 come back as bytes.

    Raises RefusedError where the pickle asks for anything else, and whatever pickle raises where it is damaged.
    """
    file = io.BytesIO(data)
    while (opcode := _OPCODES.get(file.read(1))) is not None and opcode.name != "STOP":
        # Nothing that the data do not hold is allocated. pickletools takes strings of Python 2 only in ASCII.
        argument = file.readline() if opcode.name == "STRING" else opcode.arg and opcode.arg.reader(file)
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > len(data):
            raise RefusedError(f"a table of {argument} entries")
    return _finished(_PlainUnpickler(data).load(), {})


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
        self.array: np.ndarray | list[Any] = []

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        if dtype.dtype.kind == "O":
            self.array = list(content)  # numpy would look into it for more dimensions, and may find any number
        else:
            self.array = _buffer(content, dtype, shape, "F" if fortran else "C")


def _buffer(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(content, dtype=dtype.dtype).reshape(shape, order="F" if order == "F" else "C")


def _scalar(dtype: _Dtype, content: bytes) -> Any:
    return np.frombuffer(content, dtype=dtype.dtype)[0]


def _finished(value: Any, seen: dict[int, Any]) -> Any:
    """The value with arrays where stand-ins are; each list once, however often a pickle refers to it (``seen``)."""
    if isinstance(value, _Array):
        value = value.array
    if not isinstance(value, list | tuple):
        return value
    if id(value) not in seen:
        seen[id(value)] = type(value)(_finished(part, seen) for part in value)
    return seen[id(value)]


def _plain_names() -> dict[tuple[str, str], Callable[..., Any]]:
    names: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
    }
    for core in ("numpy.core", "numpy._core"):  # NumPy 1 and NumPy 2
        names[f"{core}.multiarray", "_reconstruct"] = _Array
        names[f"{core}.multiarray", "scalar"] = _scalar
        names[f"{core}.numeric", "_frombuffer"] = _buffer
    return names


class _Callable:
    """What a pickle gets for a name: a new object each time, so that attributes that it sets do not persist."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _PlainUnpickler(pickle.Unpickler):
    """Replaces every name that a pickle may ask for by a stand-in of this module."""

    _names = _plain_names()

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._left = len(data)

    def _new_bytes(self, text: str | bytes = b"", *_: object) -> bytes:
        """How protocols up to 2 write bytes. A pickle may refer to one text many times, each time for new bytes."""
        self._left -= len(text)
        if self._left < 0:
            raise RefusedError("more bytes than it holds")
        return text.encode("latin1") if isinstance(text, str) else text

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("_codecs", "encode"), ("__builtin__", "bytes"), ("builtins", "bytes")):
            return _Callable(self._new_bytes)
        try:
            return _Callable(self._names[module, name])
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None
