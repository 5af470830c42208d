"""Functions and classes of one's own, named ``MODULE:NAME`` in a configuration."""

import importlib
import importlib.util
import inspect
import os
import sys
from pathlib import Path
from typing import Any

from ..data.errors import UsageError


def load(key: str, name: str, *, folder: str | Path | None = None, apart_from: Path | None = None) -> Any:
    """What ``MODULE:NAME`` means.

    Args:
        key: of the configuration, for messages.
        folder: where MODULE is, if it is neither on the Python path nor in the current folder.
        apart_from: a folder that comes from elsewhere, of which no code shall run: MODULE must be on the Python path
            then.

    Raises:
        UsageError: there is no such module or name in it, or importing the module fails.
    """
    module_name, _, wanted = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), wanted)):
        raise UsageError(f"{key}: found {name!r}; write MODULE:NAME")
    for place in (str(folder or ""), os.getcwd()) if apart_from is None else ():
        if place and place not in sys.path:
            sys.path.append(place)  # for good: the module's own imports may come later
    parts = module_name.split(".")
    packages = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    try:
        for package in packages:  # finding one imports those that it is in
            if apart_from is not None:
                check_apart(key, package, apart_from)
            module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name not in packages:
            raise UsageError(f"{key}: {module_name} imports {error.name}, which is not installed") from error
        where = f" in {folder or 'the current folder'} or" if apart_from is None else ""
        raise UsageError(
            f"{key}: no module {module_name}{where} on the Python path: set PYTHONPATH to the folder that it is in"
        ) from None
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{key}: {name}: {type(error).__name__} in the module: {error}") from error
    found = getattr(module, wanted, None)
    if found is None:
        here = [one for one in vars(module).values() if inspect.isfunction(one) or inspect.isclass(one)]
        there = [one.__name__ for one in here if one.__module__ == module_name]
        near = f"; it has {', '.join(there)}" if there else ""
        raise UsageError(f"{key}: {module.__file__ or module_name} has no {wanted!r}{near}")
    return found


def check_apart(key: str, module: str, apart_from: Path) -> None:
    """UsageError where the module lies in that folder; nothing of it is run."""
    spec = importlib.util.find_spec(module)
    places = [] if spec is None else [spec.origin, *(spec.submodule_search_locations or ())]
    for place in places:
        if place is None:
            continue
        given = Path(place)  # of a link both where it is and where it leads: a hub's cache consists of links
        if any(
            one.is_relative_to(apart_from.resolve()) for one in (given.resolve(), given.parent.resolve() / given.name)
        ):
            raise UsageError(
                f"{key}: {place} comes with the checkpoint, and no code in one is run: if you trust it, copy it "
                "elsewhere and set PYTHONPATH to that folder"
            )
