"""Reading what strangers wrote with torch.save: tensors and plain values, and no code.

A class that such a file names is neither imported nor called. An inert stand-in takes the place of its objects, so that
a file is readable whose objects lie where nobody looks (a scheduler's state, say), and what pfc does need is refused by
name where it is such an object.
"""

import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..data.errors import UsageError


class NotLoaded:
    """In the place of an object whose class pfc does not load; takes whatever a pickle does to it."""

    def __new__(cls, *_: Any, **__: Any) -> "NotLoaded":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


@dataclass(frozen=True)
class TorchFile:
    """A file of torch.save.

    Attributes:
        path: where it lies.
        content: what it holds, tensors on the CPU (mapped from the file where its format allows that).
        not_loaded: the classes and functions that it names and that were not loaded.
    """

    path: Path
    content: Any
    not_loaded: list[str]

    @classmethod
    def read(cls, path: Path) -> "TorchFile":
        """UsageError where it cannot be read without running code, or not at all."""
        if not path.is_file():
            raise UsageError(f"{path}: no such file")
        # The format before torch 1.6 can neither be mapped nor searched for names.
        is_zip = zipfile.is_zipfile(path)
        names: list[str] = []
        try:
            names = sorted(get_unsafe_globals_in_checkpoint(path)) if is_zip else []
            stand_ins: list[Any] = [(type(name, (NotLoaded,), {}), name) for name in names]
            with safe_globals(stand_ins):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except UnpicklingError as error:
            found = listed(names or re.findall(r"GLOBAL (\S+)", str(error))) or "its pickle is of another kind"
            raise UsageError(
                f"{path} holds more than tensors and plain values ({found}); no code in a pickle is run: "
                "load it where you trust it, and save its state_dicts alone"
            ) from None
        except (RuntimeError, ValueError, OSError) as error:  # damaged, not permitted, or TorchScript
            reason = " ".join(str(error).split("\n")[0].split(". ")[0].split())
            raise UsageError(f"{path} is damaged, or not a file that torch.save wrote: {reason}") from None
        except (EOFError, LookupError, TypeError, AttributeError):  # damaged, in the format before torch 1.6
            raise UsageError(f"{path} is damaged, or not a file that torch.save wrote") from None
        return cls(path, content, names)

    def at(self, *keys: str) -> Any:
        """The value under nested keys; None where there is none."""
        value = self.content
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def integer(self, key: str) -> int:
        """UsageError where the file does not hold one under that key."""
        value = self.at(key)
        if not isinstance(value, int):
            raise UsageError(f"{self.path}: {key} {_kind(value)}, expected a whole number")
        return value

    def tensors(self, *keys: str) -> dict[str, Tensor]:
        """The tensors by name under nested keys (all of the file without keys); UsageError where it is no such dict."""
        where, value = ".".join(keys) or "its content", self.at(*keys)
        wrong = None if isinstance(value, Mapping) else f"{where} {_kind(value)}"
        items = value.items() if isinstance(value, Mapping) else ()
        for name, tensor in items:
            if not isinstance(tensor, Tensor):
                wrong = f"{name!r} in {where} {_kind(tensor)}"
                break
        if wrong is not None:
            raise UsageError(
                f"{self.path}: {wrong}, expected a state_dict of tensors; no code in a pickle is run: "
                "load it where you trust it, and save its state_dict() alone"
            )
        return {str(name): tensor.detach() for name, tensor in items}


def listed(names: Sequence[str]) -> str:
    """The first three of them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _kind(value: Any) -> str:
    return "is missing" if value is None else f"is of type {type(value).__name__}"
