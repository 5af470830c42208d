"""Reading pickles from strangers: plain data is rebuilt, and nothing that they name is imported or called."""

import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np


class RefusedError(Exception):
    """A pickle asks for something that is not plain data; the message names it."""


def load_plain(data: bytes) -> Any:
    """Unpickle lists, tuples, bytes, numbers and plain numpy arrays; strings of Python 2 come back as bytes.

    Raises RefusedError where the pickle asks for anything else, and whatever pickle raises where it is damaged.
    """
    return _PlainUnpickler(io.BytesIO(data), encoding="bytes").load()


def _plain_dtype(name: str | bytes, *_: object) -> np.dtype[Any]:
    dtype = np.dtype(name.decode("ascii") if isinstance(name, bytes) else name)
    if dtype.kind not in "biufSO" or dtype.names:
        raise RefusedError(f"numpy arrays of {dtype}")
    return dtype


def _plain_array(*_: object) -> np.ndarray:
    return np.empty(0, dtype=np.uint8)  # the pickle fills it in


def _plain_buffer(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...], order: str) -> np.ndarray:
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if order == "F" else "C")


def _plain_scalar(dtype: np.dtype[Any], data: bytes) -> Any:
    return np.frombuffer(data, dtype=dtype)[0]


def _plain_bytes(text: str | bytes = b"", *_: object) -> bytes:
    return text.encode("latin1") if isinstance(text, str) else bytes(text)  # bytes in protocols up to 2


def _plain_names() -> dict[tuple[str, str], Callable[..., Any]]:
    names: dict[tuple[str, str], Callable[..., Any]] = {
        ("numpy", "ndarray"): _plain_array,
        ("numpy", "dtype"): _plain_dtype,
        ("_codecs", "encode"): _plain_bytes,
        ("__builtin__", "bytes"): _plain_bytes,
        ("builtins", "bytes"): _plain_bytes,
    }
    for core in ("numpy.core", "numpy._core"):  # NumPy 1 and NumPy 2
        names[f"{core}.multiarray", "_reconstruct"] = _plain_array
        names[f"{core}.multiarray", "scalar"] = _plain_scalar
        names[f"{core}.numeric", "_frombuffer"] = _plain_buffer
    return names


class _PlainUnpickler(pickle.Unpickler):
    """Replaces every name that a pickle may ask for by a function of this module."""

    _names = _plain_names()

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None
