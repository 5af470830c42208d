"""A sweep: one configuration with every combination of some values and several seeds, each a run of its own."""

from __future__ import annotations

import fcntl
import json
import math
import os
import queue
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..data.atomic import make_folder, replacing
from ..data.errors import UsageError
from ..engine.config import load_config
from ..engine.config.loading import explain, parse_yaml
from ..engine.report.sweep import COLUMNS

STATE = ".sweep.json"
"""After a run's name, beside its folder: what it was given, and, once it ended well, what it cost."""
_TRAIN = (  # which ends when this process is killed
    "import sys; from pfc.launch.rank import die_with; die_with(int(sys.argv.pop(1))); "
    "from pfc.launch.cli import main; raise SystemExit(main())"
)
_OWN = ("run.name", "run.dir", "run.seed")
_LABEL = re.compile(r"[\w.+/ -]+")


class SweepFile(BaseModel):
    """What a person writes: see docs/sweeps.md."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str
    """Configuration that all runs begin with; relative to the sweep's own folder."""
    set: dict[str, Any] = {}
    """Values of all runs, in place of the recipe's: {key.sub: value}."""
    axes: Annotated[dict[str, list[Any] | dict[str, dict[str, Any]]], Field(min_length=1)]
    """What differs. key.sub: [values]; or a name of your own: {label: {key.sub: value, ...}, ...}."""
    seeds: Annotated[int, Field(ge=1)] | Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = 5
    """How many, 0, 1, ...; or which."""
    against: dict[str, str] = {}
    """What each run is compared with: the one of the same seed with these labels in these axes."""
    figures: dict[str, list[str]] | None = None
    """Of which set which fields of evaluation.jsonl are shown; without it the leading one of each set."""


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        name: its folder's.
        point: axis → label.
        changes: as the command line of ``pfc train`` takes them, ``key.sub=value``.
    """

    name: str
    point: dict[str, str]
    seed: int
    changes: list[str]

    def own(self, folder: Path) -> list[str]:
        """What each run has of its own, besides."""
        values = {"run.name": self.name, "run.dir": str(folder), "run.seed": self.seed}
        return [f"{key}={json.dumps(values[key])}" for key in _OWN]


@dataclass(frozen=True)
class Sweep:
    """A sweep as it is carried out.

    Attributes: ``content``, what the recipe says; ``axes``, axis → its labels; the others as in ``SweepFile``.
    """

    recipe: Path
    content: Any
    axes: dict[str, list[str]]
    runs: list[Run]
    against: dict[str, str]
    figures: dict[str, list[str]]


@dataclass
class Outcome:
    """What became of a run. ``error``: one line, None where it ended well."""

    run: Run
    error: str | None = None
    done: dict[str, Any] = field(default_factory=dict)


def read_sweep(path: Path, overrides: list[str], seeds: int | None = None) -> Sweep:
    """Reads a sweep's file, and checks the configuration of every point.

    Args:
        overrides: of all runs, stronger than the file's.
        seeds: how many, in place of the file's.

    Raises:
        UsageError: it is no such file, or a configuration is refused.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
        given = SweepFile.model_validate(tree)
    except OSError as error:
        raise UsageError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path}: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        raise UsageError(f"{path}: {explain(error.errors()[0], SweepFile)}") from None
    axes = {name: _labelled(path, name, values) for name, values in given.axes.items()}
    for name, label in given.against.items():
        if label not in axes.get(name, {}):
            raise UsageError(f"{path}: against.{name}: {label!r} is no label of it: {', '.join(axes.get(name, axes))}")
    which = range(seeds) if seeds else range(given.seeds) if isinstance(given.seeds, int) else given.seeds
    _check_keys(path, given, axes, overrides)
    recipe = path.parent / given.recipe
    runs: list[Run] = []
    for seed in which:  # seed by seed, so that a sweep that was stopped has whole ones
        for labels in product(*axes.values()):
            point = dict(zip(axes, labels, strict=True))
            values = dict(given.set)
            for name, label in point.items():
                values |= axes[name][label]
            changes = [f"{key}={json.dumps(value)}" for key, value in values.items()] + overrides
            name = "-".join([re.sub(r"[^\w.]+", "_", label) for label in labels])
            runs.append(Run(f"{name}-{seed}", point, seed, changes))
            if seed == which[0]:
                load_config(recipe, [*changes, *runs[-1].own(path.parent)])
    if len({run.name for run in runs}) < len(runs):
        raise UsageError(f"{path}: axes: two points would have one folder: give labels that differ in their letters")
    labels = {name: [*values] for name, values in axes.items()}
    return Sweep(recipe, _content(recipe), labels, runs, given.against, given.figures or {})


def _check_keys(path: Path, given: SweepFile, axes: dict[str, dict[str, dict[str, Any]]], overrides: list[str]) -> None:
    """UsageError where a label would not say what was trained: two would set one key, or the sweep sets it itself."""
    setting = {name: {key for values in labels.values() for key in values} for name, labels in axes.items()}
    setting["the command line"] = {override.partition("=")[0].strip() for override in overrides}
    for name, keys in [*setting.items(), ("set", set(given.set))]:
        if own := sorted(key for key in keys if key in _OWN or key == "run"):
            raise UsageError(f"{path}: {name}: {own[0]} is set for each run by the sweep itself: leave it out")
    for (one, ours), (other, theirs) in combinations(setting.items(), 2):
        for key, second in product(sorted(ours), sorted(theirs)):
            if f"{key}.".startswith(f"{second}.") or f"{second}.".startswith(f"{key}."):
                raise UsageError(f"{path}: {key} of {one} and {second} of {other} set the same: put them into one axis")
    for name in axes:
        if name in COLUMNS or name == "set":
            raise UsageError(f"{path}: axes.{name}: that is a column of the results: take another name")


def _labelled(path: Path, name: str, values: list[Any] | dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Label → values of an axis."""
    if isinstance(values, list):
        if len({repr(value) for value in values}) < len(values):
            raise UsageError(f"{path}: axes.{name}: a value stands there twice: leave one out")
        values = {
            (value if isinstance(value, str) else json.dumps(value, default=str)): {name: value} for value in values
        }
    if not values:
        raise UsageError(f"{path}: axes.{name}: no value: give at least one")
    for label in values:
        if not _LABEL.fullmatch(label):
            raise UsageError(
                f"{path}: axes.{name}: {label!r} names folders too: letters, digits and ./+-_ ; for other values give "
                "{label: {key.sub: value}}"
            )
    return values


def perform(
    sweep: Sweep,
    folder: Path,
    *,
    ranks: int,
    at_once: int,
    gpus: int,
    tell: Callable[[int, int, Outcome], None],
) -> list[Outcome]:
    """Trains all runs that ``folder`` does not have yet; one that fails does not end the others.

    Args:
        folder: of the runs, each in a folder of its own with its output beside it, NAME.log.
        ranks: of each run.
        at_once: runs at the same time.
        gpus: how many this machine has; each run gets ``ranks`` of them for itself, if there are any.
        tell: called with (done, of how many, which was done last).

    Raises:
        UsageError: ``folder`` has a run of that name with other values, or another sweep works in it.
    """
    if 0 < gpus < ranks:
        raise UsageError(f"--nproc {ranks}: there are {gpus} GPUs here: take at most as many")
    make_folder(folder)
    with _alone(folder):
        return _perform(sweep, folder, ranks, at_once, gpus, tell)


def _perform(
    sweep: Sweep, folder: Path, ranks: int, at_once: int, gpus: int, tell: Callable[[int, int, Outcome], None]
) -> list[Outcome]:
    outcomes = [Outcome(run, None, _known(sweep, run, folder)) for run in sweep.runs]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = [one.strip() for one in visible.split(",")] if visible else [str(number) for number in range(gpus)]
    slots: queue.SimpleQueue[str] = queue.SimpleQueue()
    for slot in range(at_once):
        slots.put(",".join(cards[slot * ranks : (slot + 1) * ranks]) if gpus else "")
    waiting = [outcome for outcome in outcomes if "seconds" not in outcome.done]
    with ThreadPoolExecutor(at_once) as pool, _children() as children:
        futures = {pool.submit(_train, sweep, one, folder, ranks, slots, children): one for one in waiting}
        try:
            for done, future in enumerate(as_completed(futures), len(outcomes) - len(waiting) + 1):
                future.result()
                tell(done, len(outcomes), futures[future])
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return outcomes


def _known(sweep: Sweep, run: Run, folder: Path) -> dict[str, Any]:
    """What is written of a run that was begun; UsageError where it was given other values."""
    state = folder / f"{run.name}{STATE}"
    try:
        known = json.loads(state.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError):
        raise UsageError(f"{state} cannot be read: remove it, and {folder / run.name}") from None
    if not (folder / run.name).exists():
        return {}
    if (known["recipe"], known["changes"]) != (sweep.content, run.changes):
        raise UsageError(f"{folder / run.name} is a run with other values: give another --out, or remove that folder")
    return known


def _write_state(path: Path, about: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _content(recipe: Path) -> Any:
    """What a recipe says, as JSON has it."""
    return json.loads(json.dumps(parse_yaml(recipe.read_text(encoding="utf-8")), default=str))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """UsageError where another sweep works in the folder."""
    lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UsageError(f"{folder}: another sweep works in it: wait for it, or give another --out") from None
    except OSError:  # a disk without locks
        pass
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def _children() -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes of runs; Ctrl-C and the signals that stop a run end them, after they have saved, before this one
    ends."""
    running: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _: Any) -> None:
        raise SystemExit(75 if number == signal.SIGUSR1 else 128 + number)

    stopping = [
        one for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1) if signal.getsignal(one) != signal.SIG_IGN
    ]
    before = {one: signal.signal(one, stop) for one in stopping}
    try:
        yield running
    except BaseException:
        for process in running:
            with suppress(ProcessLookupError):
                process.send_signal(signal.SIGTERM)
        raise
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _train(
    sweep: Sweep,
    outcome: Outcome,
    folder: Path,
    ranks: int,
    slots: queue.SimpleQueue[str],
    children: list[subprocess.Popen[bytes]],
) -> None:
    run = outcome.run
    command = ["train", str(sweep.recipe), *run.changes, *run.own(folder), "--nproc", str(ranks)]
    environment = dict(os.environ)
    gpus = slots.get()
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = gpus
    else:
        environment.setdefault("OMP_NUM_THREADS", "1")
        command.insert(2, "data.threads=1")
    if _content(sweep.recipe) != sweep.content:
        outcome.error = f"{sweep.recipe} was changed since the sweep began: give the command again, with another --out"
        slots.put(gpus)
        return
    begun = outcome.done or {"recipe": sweep.content, "changes": run.changes, "stopped": 0}
    state = folder / f"{run.name}{STATE}"
    _write_state(state, {**begun, "stopped": begun["stopped"] + 1})
    told, start = folder / f"{run.name}.log", time.monotonic()
    with told.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", _TRAIN, str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,  # Ctrl-C reaches this process, which tells its children
        )
        children.append(process)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        children.remove(process)
    slots.put(gpus)
    if process.returncode:
        lines = told.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["no output"]
        outcome.error = f"{lines[-1].removeprefix('pfc: ')} ({told})"
        return
    outcome.done = {
        **begun,
        "seconds": round(time.monotonic() - start, 1),
        "processor_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_bytes": used.ru_maxrss * 1024,
    }
    _write_state(state, outcome.done)


def largest_at_once(ranks: int, gpus: int, cores: int) -> int:
    """How many runs this machine takes at the same time."""
    return max(1, math.floor((gpus or cores) / ranks))
