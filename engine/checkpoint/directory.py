"""The directory of a run's checkpoints: which it has, how one gets its name, which stay, and the space on the disk.

``checkpoints/step-00000500`` is a complete one: it got that name when all of it was on the disk. ``checkpoints/latest``
is a link to the one that was written last, ``checkpoints/best`` to the best by the configured metric.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from ...data.errors import UsageError
from ..build import input_size, new_network
from ..config import Config, load_config
from .reading import AVERAGE, BACKBONE, STATE, Found, load, network_tensors

FOLDER, CONFIG, LABELS = "checkpoints", "config.yaml", "labels.json"
LATEST, BEST = "latest", "best"
EVALUATION = "evaluation"
"""Where the counters of a checkpoint hold what was measured at its step: set → metric → value."""
_NAME = re.compile(r"step-(\d{8,})")


def name_of(step: int) -> str:
    """Of a checkpoint's directory."""
    return f"step-{step:08d}"


def find_all(run_dir: Path) -> list[Found]:
    """The complete checkpoints of a run, by step."""
    folder = run_dir / FOLDER
    if not folder.is_dir():
        return []
    names = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()]
    found = [Found(path, int(match[1])) for path, match in names if match and (path / STATE).is_file()]
    return sorted(found, key=lambda one: one.step)


def find_latest(run_dir: Path) -> Found | None:
    """The checkpoint that the run wrote last; None where it has none."""
    named = _linked(run_dir / FOLDER / LATEST)
    return named or max(find_all(run_dir), key=lambda one: one.written, default=None)


def find(path: Path) -> Found:
    """The checkpoint at ``path``, which may be a link to one, or the latest of the run there.

    Raises:
        UsageError: there is none.
    """
    if (one := _at(path) or _linked(path)) is not None:
        return one
    if not path.exists():
        raise UsageError(f"{path}: no such run or checkpoint")
    latest = find_latest(path)
    if latest is None:
        raise UsageError(f"{path}: no complete checkpoint there; give a run's directory or its checkpoints/step-*")
    return latest


def _at(path: Path) -> Found | None:
    match = _NAME.fullmatch(path.name)
    return Found(path, int(match[1])) if match and (path / STATE).is_file() else None


def _linked(link: Path) -> Found | None:
    return _at(link.parent / link.readlink()) if link.is_symlink() else None


@dataclass(frozen=True)
class Best:
    """What makes a checkpoint the best.

    Attributes:
        metric: a field of evaluation.jsonl.
        set: the verification set.
        mode: whether the largest or the smallest is the best.
    """

    metric: str
    set: str
    mode: Literal["max", "min"]

    def value(self, state: dict[str, Any]) -> float | None:
        """The metric in the counters of a checkpoint; None where its step was not evaluated."""
        value = state.get(EVALUATION, {}).get(self.set, {}).get(self.metric)
        return float(value) if isinstance(value, int | float) else None

    def beats(self, value: float, other: float) -> bool:
        return value > other if self.mode == "max" else value < other

    def of(self, checkpoints: Iterable[Found]) -> Found | None:
        """The best of them, the earliest of equal ones; None where none was evaluated."""
        champion, champion_value = None, 0.0
        for found in checkpoints:
            value = self.value(found.state())
            if value is not None and (champion is None or self.beats(value, champion_value)):
                champion, champion_value = found, value
        return champion


def load_backbone(run_or_checkpoint: Path) -> tuple[nn.Module, Config]:
    """The trained network in evaluation mode, on the CPU, and the configuration of its run; with the average of its
    weights, where the run keeps one.

    Args:
        run_or_checkpoint: a run's directory (its latest checkpoint is taken) or a checkpoint's.
    """
    found = find(run_or_checkpoint)
    config = load_config(found.path / CONFIG)
    path = found.path.resolve()
    run_dir = path.parent.parent if path.parent.name == FOLDER else path
    network = new_network(config, input_size(config), apart_from=run_dir)
    averaged = config.backbone.ema is not None and any(name.startswith(AVERAGE) for name in found.shapes())
    load(found, network_tensors(network, AVERAGE if averaged else BACKBONE))
    return network.eval(), config


def install(temporary: Path, final: Path) -> None:
    """Gives a complete checkpoint its name, in the place of one that has it, and makes it the latest.

    Every file and the directory are brought to the disk (fsync) first, so that whatever is called ``step-…`` is
    complete, whenever the power fails.
    """
    folder = final.parent
    for path in (*temporary.iterdir(), temporary):
        _sync(path)
    replaced = None
    if final.exists():  # the run was taken up again at an earlier step and has come here once more
        _point_elsewhere(folder, final)
        replaced = _set_aside(final)
    os.rename(temporary, final)
    _sync(folder)
    _point(folder, LATEST, final.name)
    _sync(folder)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def go_back(found: Found, later: Sequence[Found]) -> None:
    """Makes ``found`` the latest and removes the ``later`` ones.

    Killed at any moment, ``found`` is the latest, and what is half removed does not look like a checkpoint.
    """
    if not later:
        return
    folder = found.path.parent
    _point(folder, LATEST, found.path.name)
    _sync(folder)
    for one in sorted(later, key=lambda one: -one.step):
        _point_elsewhere(folder, one.path)
        _remove(one.path)


def tidy(run_dir: Path, keep: int, best: Best | None) -> None:
    """Removes all but the ``keep`` that were written last, the latest and the best, and renews the link to the best."""
    folder, checkpoints = run_dir / FOLDER, find_all(run_dir)
    champion = best.of(checkpoints) if best is not None else None
    if champion is not None:
        _point(folder, BEST, champion.path.name)
    elif (folder / BEST).is_symlink():
        (folder / BEST).unlink()
    spared = (champion, find_latest(run_dir))
    for old in sorted(checkpoints, key=lambda found: found.written)[:-keep]:
        if old not in spared:
            _remove(old.path)


def _point(folder: Path, link: str, target: str) -> None:
    """Makes ``link`` in ``folder`` name ``target`` there, in one go: at no moment is it missing or half made."""
    temporary = folder / f".{link}.partial"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, folder / link)


def _point_elsewhere(folder: Path, old: Path) -> None:
    others = [found for found in find_all(folder.parent) if found.path != old]
    for link in (LATEST, BEST):
        if (folder / link).is_symlink() and (folder / link).readlink().name == old.name:
            if others:
                _point(folder, link, max(others, key=lambda found: found.written).path.name)
            else:
                (folder / link).unlink()


def _set_aside(path: Path) -> Path:
    """Takes its name away first: what is half removed must not look like a checkpoint."""
    hidden = path.with_name(f".{path.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    os.rename(path, hidden)
    return hidden


def _remove(path: Path) -> None:
    shutil.rmtree(_set_aside(path), ignore_errors=True)


def _sync(path: Path) -> None:
    """Brings a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_space(run_dir: Path, size: int, keep: int, *, best: bool) -> str | None:
    """Looks at the file system of the run's directory, which is made if it is missing.

    A checkpoint is written while those before it are still there, so ``keep`` of them take ``keep + 1`` places.

    Args:
        run_dir: of the run.
        size: bytes of one checkpoint, of all ranks.
        keep: how many stay.
        best: whether the best one stays too.

    Returns:
        A warning, where one fits but not all.

    Raises:
        UsageError: not even one and its successor fit, or the directory cannot be written.
    """
    folder = run_dir / FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        # What is there will have given way to newer ones by then.
        own = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(folder).free + own
    except OSError as error:
        raise UsageError(
            f"{error.filename or folder}: {error.strerror}: no checkpoint can be written there; give another run.dir"
        ) from None
    if free < 2 * size:
        raise UsageError(
            f"{folder}: a checkpoint takes {_told(size)} and stays until the next one is written, but only "
            f"{_told(free)} are free: free some space, or give a run.dir on another disk"
        )
    places = keep + 1 + best
    if free < places * size:
        return (
            f"{folder}: {_told(free)} are free, and {places} checkpoints of {_told(size)} (the {keep} that are kept"
            f"{', the best' if best else ''} and the one being written) take {_told(places * size)}: lower "
            "checkpoint.keep, or free some space"
        )
    return None


def _told(size: float) -> str:
    """A number of bytes: ``2.1 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:,.1f} TB"
