"""Who hears of a run: hooks of one's own, Weights & Biases, MLflow, the profiler."""

import io
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pfc.data.errors import UsageError
from pfc.engine.config import Config, parse_config
from pfc.engine.log.hooks import Hook, RunInfo
from pfc.engine.log.loggers import open_loggers
from pfc.engine.log.loggers.mlflow import MLflow
from pfc.engine.log.loggers.wandb import WandB
from pfc.engine.log.telemetry import Telemetry
from tests.engine.runs import configuration, pack, train

SPY = """
import io
import json
from contextlib import nullcontext
from pfc.engine.log.hooks import Hook

class Spy(Hook):
    every_rank = True

    def __init__(self, file="spy", fails=()):
        self.file, self.fails = file, fails

    def _note(self, what, *values):
        with open(self.run.directory / f"{self.file}-{self.run.rank}.jsonl", "a") as file:
            print(json.dumps([what, *values]), file=file)
        if what in self.fails:
            raise ValueError(f"no {what} today")

    def start(self, run):
        self.run = run
        self._note("start", run.resumed_step, run.total_steps, run.world_size, run.config["schedule"]["steps"])

    def step(self, step, values):
        self._note("step", step, values["loss"])

    def evaluation(self, step, values):
        self._note("evaluation", step, values["set"], values["accuracy"])

    def checkpoint(self, step, folder):
        self._note("checkpoint", step, str(folder), folder.is_dir())

    def rollback(self, step):
        self._note("rollback", step)

    def end(self, finished):
        self._note("end", finished)

class First(Spy):
    every_rank = False

class Alone:
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pack(tmp_path_factory.mktemp("data"))
    (folder / "code").mkdir()
    (folder / "code" / "hook_spies.py").write_text(SPY)
    return folder


def told(run: Path, name: str) -> list[list[Any]]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def spied(folder: Path, runs: Path, *loggers: Any, every_steps: int = 4, **sections: Any) -> Config:
    sections = {"evaluation": {"every_steps": 1000, "pairs": [str(folder / "pairs.bin")]}, **sections}
    run = {"name": "test", "dir": str(runs), "code": str(folder / "code")}
    tree = configuration(folder, runs, run=run, **sections).model_dump()
    tree["log"] = {"every_steps": every_steps, "loggers": list(loggers)}
    return parse_config(tree)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_hooks_hear_of_a_run_from_its_start_to_its_end(folder: Path, tmp_path: Path, asynchronous: bool) -> None:
    config = spied(
        folder,
        tmp_path,
        "hook_spies:Spy",
        {"name": "hook_spies:First", "file": "first"},
        checkpoint={"every_steps": 5, "asynchronous": asynchronous},
    )
    train(2, config, steps=3)
    train(2, config)
    run = config.run.path
    first = told(run, "first-0.jsonl")
    assert [line[:2] for line in first if line[0] != "checkpoint"] == [
        ["start", 0],
        ["evaluation", 0],
        ["step", 1],
        ["end", False],
        ["start", 3],
        ["step", 4],
        ["step", 8],
        ["evaluation", 8],
        ["end", True],
    ]
    assert first[0] == ["start", 0, 8, 2, 8]
    saved = [line for line in first if line[0] == "checkpoint"]
    assert [line[1] for line in saved] == [3, 5, 8]
    assert all(line[2].endswith(f"step-{line[1]:08d}") and line[3] for line in saved)
    metrics = {line["step"]: line["loss"] for line in told(run, "metrics.jsonl")}  # type: ignore[call-overload]
    assert all(line[2] == metrics[line[1]] for line in first if line[0] == "step")
    assert told(run, "spy-0.jsonl") == first
    # When an asynchronous save has ended is seen by each rank for itself.
    assert sorted(map(str, told(run, "spy-1.jsonl"))) == sorted(map(str, first))
    assert not (run / "first-1.jsonl").exists()


@pytest.mark.parametrize("what", ["start", "step", "evaluation", "checkpoint", "end"])
def test_a_hook_that_fails_is_told_once_and_the_run_goes_on(
    folder: Path, tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]
) -> None:
    config = spied(
        folder,
        tmp_path,
        {"name": "hook_spies:First", "fails": [what]},
        {"name": "hook_spies:First", "file": "other"},
        every_steps=1,
    )
    lines = train(1, config)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert [line[0] for line in told(config.run.path, "other-0.jsonl")][-1] == "end"
    heard = {line[0] for line in told(config.run.path, "spy-0.jsonl")}
    assert (heard == {"start"}) == (what == "start")


def test_what_a_failing_hook_raised_is_told(tmp_path: Path) -> None:
    class Broken(Hook):
        def step(self, step: int, values: Any) -> None:
            raise ConnectionError("no\nroute")

    output = io.StringIO()
    console = Console(file=output, width=40)
    run = Telemetry(tmp_path, total_steps=5, world_size=1, is_main=True, console=console, hooks=[Broken()])
    for step in (1, 2):
        run.log(step, {"loss": 1.0})
    run.close()
    warnings = [line for line in output.getvalue().splitlines() if "warning" in line]
    assert warnings == ["warning    Broken, in step: ConnectionError: no route; training goes on"]


@pytest.mark.parametrize(
    ("logger", "message"),
    [
        ("tensorbord", r"log\.loggers\[0\]: found 'tensorbord'; allowed: tensorboard, wandb, mlflow, or MODULE:CLASS"),
        ("hook_spies:Alone", r"log\.loggers\[0\]: hook_spies:Alone is no subclass of pfc\.engine\.log\.hooks\.Hook"),
        ("hook_spies:Gone", r"has no 'Gone'; it has Spy, First, Alone"),
        ("hook_nowhere:Spy", r"no module hook_nowhere in .*code or on the Python path"),
        ({"name": "hook_spies:Spy", "wrong": 1}, r"does not take \{'wrong': 1\}: .*'wrong'"),
        ({"name": "tensorboard", "wrong": 1}, r"does not take \{'wrong': 1\}"),
    ],
)
def test_wrong_loggers_are_refused(folder: Path, tmp_path: Path, logger: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        open_loggers(spied(folder, tmp_path, logger))
    assert "\n" not in str(caught.value)


def test_the_old_switch_of_tensorboard_still_means_what_it_said() -> None:
    def loggers(log: dict[str, Any]) -> list[str]:
        tree = {"data": {"train": "set"}, "schedule": {"steps": 1}, "log": log}
        return [one.name for one in parse_config(tree).log.loggers]

    assert loggers({}) == ["tensorboard"]
    assert loggers({"tensorboard": True}) == ["tensorboard"]
    assert loggers({"tensorboard": False}) == []
    assert loggers({"tensorboard": False, "loggers": ["tensorboard", "wandb"]}) == ["wandb"]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_one_line(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, name, None)
    with pytest.raises(UsageError, match=rf"{name} is not installed: pip install 'pfc\[{name}\]'"):
        open_loggers(spied(folder, tmp_path, name))


def info(folder: Path, resumed_step: int = 0) -> RunInfo:
    config = {"schedule": {"steps": 9}, "head": {"objective": {"name": "arcface"}}, "many": list(range(400))}
    folder.mkdir(exist_ok=True)
    return RunInfo(folder, config, 9, 1, 0, resumed_step, print, lambda _: nullcontext())


def test_mlflow_s_file_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = f"file:{tmp_path / 'store'}"
    for resumed, finished in ((0, False), (3, True)):
        hook = MLflow(experiment="faces", tracking_uri=store)
        hook.start(info(tmp_path / "run", resumed))
        hook.step(resumed + 1, {"loss": 2.0 - resumed / 10, "note": "text", "norm": float("nan")})
        hook.evaluation(resumed + 1, {"set": "lfw", "accuracy": 0.75})
        hook.end(finished)
    client = mlflow.MlflowClient(store)
    (run,) = client.search_runs([client.get_experiment_by_name("faces").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params["head.objective.name"] == "arcface"
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in history] == [(1, 2.0), (4, 1.7)]
    assert run.data.metrics["evaluation/lfw/accuracy"] == 0.75
    assert "train/norm" not in run.data.metrics


def test_weights_and_biases_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for resumed in (0, 3):
        hook = WandB(mode="offline", project="faces")
        hook.start(info(tmp_path / "run", resumed))
        hook.step(resumed + 1, {"loss": 2.0, "note": "text"})
        hook.evaluation(resumed + 1, {"set": "lfw", "accuracy": 0.75})
        hook.end(True)
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.stem for file in files}) == 1, "a run that goes on is the same one"
    content = files[0].read_bytes()
    assert all(text in content for text in (b"train/loss", b"evaluation/lfw/accuracy", b"arcface", b"faces"))
    assert b"train/note" not in content


def test_weights_and_biases_does_not_ask_for_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(UsageError, match=r"wandb knows no key: run `wandb login`, or set WANDB_MODE=offline"):
        WandB(project="faces")
    WandB(mode="offline")


def test_some_steps_are_profiled(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, log={"every_steps": 1, "tensorboard": False, "profile": [3, 4]})
    lines = train(2, config)
    assert len(lines) == 8
    profile = config.run.path / "profile"
    summary = (profile / "summary.txt").read_text()
    assert summary.startswith("steps 3 to 4: ")
    for phase in ("forward pass of the backbone", "head", "backward pass", "optimizer step", "waiting for a batch"):
        assert f"\n{phase} " in summary
    assert "aten::convolution" in summary
    trace = json.loads((profile / "trace.json").read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("pfc: backward pass") >= 2
    assert sorted(file.name for file in profile.iterdir()) == ["summary.txt", "trace.json"]


def test_a_run_that_ends_before_writes_what_it_has_profiled(folder: Path, tmp_path: Path) -> None:
    log = {"every_steps": 1, "tensorboard": False, "profile": [7, 100]}
    config = configuration(folder, tmp_path, log=log)
    train(1, config)
    assert (config.run.path / "profile" / "summary.txt").read_text().startswith("steps 7 to 8: ")
    later = configuration(folder, tmp_path / "later", log={**log, "profile": [50, 60]})
    train(1, later)
    assert not (later.run.path / "profile").exists()
    for wrong in ([4, 3], [0, 3], [1]):
        with pytest.raises(UsageError, match=r"log(\.|: )profile"):
            configuration(folder, tmp_path, log={"profile": wrong})
