"""``pfc sweep``: a grid of values and seeds over one configuration."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pyarrow.parquet
import pytest
import yaml

from pfc.data import RecordDataset, UsageError, make_pairs, pack_synthetic, write_pairs
from pfc.engine.log.telemetry import read_json_lines
from pfc.engine.report import sweep as report
from pfc.launch import sweep
from pfc.launch.cli import main
from pfc.launch.sweep import perform, read_sweep
from tests.commands import Command, run_pfc, wait_until

AXES = {
    "loss": {"cosface": {"head.objective": {"name": "cosface", "scale": 16.0}}},
    "head.sample_rate": [1.0, 0.5],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A recipe of three steps, and a sweep of 1 × 2 points."""
    pack_synthetic(tmp_path / "set", identities=6, images_per_identity=4, size=32, workers=1)
    write_pairs(tmp_path / "pairs.bin", make_pairs(RecordDataset.open(tmp_path / "set"), 20, seed=0))
    recipe = {
        "data": {"train": str(tmp_path / "set"), "batch_size": 4},
        "backbone": {"name": "small", "embedding_dim": 16, "options": {"width": 8}},
        "schedule": {"steps": 3},
        "evaluation": {"pairs": [str(tmp_path / "pairs.bin")]},
        "log": {"tensorboard": False},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    write(tmp_path)
    return tmp_path


class Forked:
    """In place of subprocess.Popen: the same program, with the same arguments, in a fork, which has torch already."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: BinaryIO,
        stderr: BinaryIO,
        env: dict[str, str],
        start_new_session: bool,
    ) -> None:
        python, option, code, *arguments = command
        assert (python, option, stdin, start_new_session) == (sys.executable, "-c", subprocess.DEVNULL, True)
        sys.stdout.flush()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        exit_code: Any = 1
        try:
            os.setsid()
            for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(one, signal.SIG_DFL)
            for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), stdout.fileno(), stderr.fileno())):
                os.dup2(file, number)
            os.environ.clear()
            os.environ.update(env)
            sys.argv = [option, *arguments]
            exec(code, {"__name__": "__main__"})
            exit_code = 0
        except SystemExit as end:
            exit_code = end.code or 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(exit_code)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def run_forked(arguments: Sequence[str]) -> int:
    """``pfc ARGUMENTS...``, a sweep whose runs are forks; in the process of a command."""
    sweep.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)  # type: ignore[assignment]
    return run_pfc(arguments)


def write(folder: Path, **changes: object) -> Path:
    tree = {"recipe": "recipe.yaml", "axes": AXES, "seeds": 2, "against": {"head.sample_rate": "1.0"}} | changes
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "sweep.yaml"


def test_every_point_is_trained_with_every_seed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out"
    command = ["sweep", str(write(folder, set={"optimizer.accumulate": 2})), "--out", str(out)]
    ended = Command(run_forked, command).wait()
    assert ended.exit_code == 0, ended.output
    told = ended.out
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4
    for row in rows:
        run = out / f"{row['loss']}-{row['head.sample_rate']}-{row['seed']}"
        settings = yaml.safe_load((run / "config.yaml").read_text())
        assert settings["run"]["seed"] == int(row["seed"])
        assert settings["optimizer"]["accumulate"] == 2
        assert settings["head"]["objective"]["name"] == row["loss"]
        assert settings["head"]["sample_rate"] == float(row["head.sample_rate"])
        last = json.loads((run / "evaluation.jsonl").read_text().splitlines()[-1])
        assert (row["set"], float(row["accuracy"])) == ("pairs", last["accuracy"])
        assert float(row["seconds"]) > 0
        assert float(row["processor_seconds"]) > 0
        assert 50 < float(row["peak_mib"]) < 10_000
    assert pyarrow.parquet.read_table(out / "results.parquet").num_rows == 4
    assert "data:image/svg+xml" in (out / "sweep.html").read_text()
    assert told.count("run        ") == 4

    by = {(row["loss"], row["head.sample_rate"], row["seed"]): float(row["accuracy"]) for row in rows}
    ours, base = ([by["cosface", rate, seed] for seed in "01"] for rate in ("0.5", "1.0"))
    (line,) = (line for line in told.splitlines() if line.split()[:2] == ["cosface", "0.5"])
    assert f"{np.mean(ours):.4f} ± {np.std(ours, ddof=1):.4f}" in line
    assert f"{np.mean(ours) - np.mean(base):+.4f} [" in line

    written = (out / "cosface-0.5-1" / "metrics.jsonl").stat().st_mtime_ns
    assert main(command) == 0, "it has all of it"
    assert (out / "cosface-0.5-1" / "metrics.jsonl").stat().st_mtime_ns == written
    assert "run        " not in capsys.readouterr().out
    assert main([*command, "schedule.steps=4"]) == 2
    assert "is a run with other values: give another --out" in capsys.readouterr().err
    assert main([*command, "head.sample_rate=0.3"]) == 2
    assert "head.sample_rate of head.sample_rate and head.sample_rate of the command line" in capsys.readouterr().err
    lock = os.open(out, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert main(command) == 2
    assert "another sweep works in it" in capsys.readouterr().err
    os.close(lock)
    assert (
        main(
            ["sweep", str(write(folder, set={"optimizer.accumulate": 2}, figures={"pairs": ["acuracy"]})), *command[2:]]
        )
        == 2
    )
    assert "figures: no acuracy of pairs; there are: accuracy" in capsys.readouterr().err


def test_a_run_that_fails_does_not_end_the_others(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(
        folder,
        axes={"data": {"good": {}, "bad": {"data.train": str(folder / "nowhere")}}},
        against={"data": "good"},
        seeds=[3],
    )
    told = Command(run_forked, ["sweep", str(file), "--out", str(folder / "out")]).wait()
    assert told.exit_code == 1
    assert "bad-3 failed: " in told.error
    assert "nowhere: no such data set" in told.error
    assert "1 of 2 runs failed: give the command again" in told.error
    assert any(line.split()[0] == "good" for line in told.out.splitlines() if line)
    assert "no such data set" in (folder / "out" / "sweep.html").read_text()
    pack_synthetic(folder / "nowhere", identities=6, images_per_identity=4, size=32, workers=1)
    # This once as a user has it: the run is a program of its own.
    assert main(["sweep", str(file), "--out", str(folder / "out")]) == 0
    assert capsys.readouterr().out.count("run        ") == 1


def test_a_sweep_that_is_stopped_goes_on(folder: Path) -> None:
    file = write(
        folder, axes={"optimizer.backbone.lr": [0.1, 0.05]}, against={}, seeds=1, set={"schedule.steps": 100_000}
    )
    metrics = [folder / "out" / f"{rate}-0" / "metrics.jsonl" for rate in ("0.1", "0.05")]
    before = 0
    for _ in range(2):
        command = Command(run_forked, ["sweep", str(file), "--out", str(folder / "out"), "--at-once", "2"])
        wait_until(partial(more_than, before, metrics), 120)
        command.send_signal(signal.SIGTERM)
        assert command.wait().exit_code == 143
        assert all((path.parent / "checkpoints" / "latest").exists() for path in metrics)
        before = max(len(steps(path)) for path in metrics)
    assert main(["sweep", str(file), "schedule.steps=1", "--out", str(folder / "out")]) == 2, "begun with other values"
    for path in metrics:  # the second start went on where the first had saved
        assert steps(path) == sorted(set(steps(path)))


def more_than(lines: int, metrics: list[Path]) -> bool:
    return all(len(steps(path)) > lines for path in metrics)


def steps(path: Path) -> list[int]:
    return [line["step"] for line in read_json_lines(path)] if path.exists() else []


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"axes": {}}, "axes: "),
        ({"axes": {"a": [{"b": 1}]}}, "axes.a: '{\"b\": 1}' names folders too"),
        ({"axes": {"loss": {"x": {"head.objective": {"name": "none"}}}}, "against": {}}, "unknown objective 'none'"),
        ({"against": {"loss": "nothing"}}, "against.loss: 'nothing' is no label of it: cosface"),
        ({"axes": {"loss": {"a/b": {}, "a b": {}}}, "against": {}}, "two points would have one folder"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml: no such configuration file"),
        ({"seed": 1}, "seed: unknown key; did you mean seeds?"),
        ({"seeds": 0}, "seeds"),
        (
            {"axes": {"a": {"x": {"schedule.steps": 2}}, "schedule.steps": [3]}, "against": {}},
            "schedule.steps of a and schedule.steps of",
        ),
        ({"axes": {"head": [{}], "head.sample_rate": [1.0]}}, "axes.head: '{}' names folders too"),
        ({"axes": {"a": {"x": {"head": {}}}, "head.sample_rate": [1.0]}}, "head of a and head.sample_rate of"),
        ({"set": {"run.seed": 3}}, "run.seed is set for each run by the sweep itself"),
        ({"axes": {"seed": {"x": {}}}, "against": {}}, "axes.seed: that is a column of the results"),
        ({"axes": {"head.sample_rate": [1.0, 1.0]}}, "a value stands there twice"),
    ],
)
def test_what_is_wrong_is_told_before_anything_is_trained(
    changes: dict, what: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(write(folder, **changes)), "--out", str(folder / "out")]) == 2
    told = capsys.readouterr().err
    assert what in told
    assert len(told.splitlines()) == 1
    assert not (folder / "out").exists()


def test_all_combinations_are_runs_seed_by_seed(folder: Path) -> None:
    axes = {"head.sample_rate": [1.0, 0.5, 0.25], "optimizer.accumulate": [1, 2]}
    runs = read_sweep(write(folder, axes=axes, against={}, seeds=[4, 7]), ["schedule.steps=2"]).runs
    assert [run.seed for run in runs] == [4] * 6 + [7] * 6
    points = [(run.point["head.sample_rate"], run.point["optimizer.accumulate"]) for run in runs[:6]]
    assert points == [(rate, steps) for rate in ("1.0", "0.5", "0.25") for steps in ("1", "2")]
    assert runs[3].changes == ["head.sample_rate=0.5", "optimizer.accumulate=2", "schedule.steps=2"]


def test_the_interval_is_students(folder: Path) -> None:
    values = [0.5, 0.6, 0.9, 0.4]
    assert report.interval(values) == pytest.approx(3.182446 * np.std(values, ddof=1) / 2, rel=1e-6)


def test_the_sweeps_that_come_along_are_accepted() -> None:
    configs = Path(__file__).parents[2] / "configs"
    evidence = [file for file in configs.glob("evidence/*.yaml") if file.name != "print.yaml"]
    files = sorted([*configs.glob("sweeps/*.yaml"), *evidence])
    assert files
    for file in files:
        assert len(read_sweep(file, []).runs) > 1


def test_each_run_gets_gpus_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def started(command: list[str], *, env: dict[str, str], **_: object) -> subprocess.Popen[bytes]:
        given.append(env["CUDA_VISIBLE_DEVICES"])
        return Popen([sys.executable, "-c", "raise SystemExit(1)"])

    Popen = subprocess.Popen
    monkeypatch.setattr("pfc.launch.sweep.subprocess.Popen", started)
    found = read_sweep(write(folder, seeds=4), [])

    def perform_on(gpus: int, ranks: int) -> list[str]:
        given.clear()
        perform(found, folder / "out", ranks=ranks, at_once=max(1, gpus // ranks), gpus=gpus, tell=lambda *_: None)
        return sorted(set(given))

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert perform_on(4, 2) == ["0,1", "2,3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4, GPU-ab")
    assert perform_on(2, 1) == ["4", "GPU-ab"]
    with pytest.raises(UsageError, match="--nproc 3: there are 2 GPUs here"):
        perform_on(2, 3)
