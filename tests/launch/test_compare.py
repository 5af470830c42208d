"""``pfc compare`` and ``pfc watch``: several runs at a glance."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from pfc.launch.cli import main


def write_run(folder: Path, *, steps: int = 40, rate: float = 0.1, seconds_ago: float = 0.0, **last: Any) -> Path:
    folder.mkdir(parents=True)
    config = {
        "run": {"name": folder.name, "dir": str(folder.parent)},
        "head": {"objective": {"name": "cosface", "margin": 0.4}, "sample_rate": rate},
        "schedule": {"steps": 40},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    lines = [
        {"step": step, "loss": 20 / step, "lr": 0.1, "images_per_second": 1000 + step, "data_share": 0.25}
        | {"elapsed_seconds": 2.0 * step, "skipped_steps": 0}
        for step in range(1, steps + 1)
    ]
    lines[-1] |= last
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if steps > 10:
        result = {"step": 10, "set": "lfw", "pairs": 40, "accuracy": 1 - rate, "accuracy_std": 0.01, "eer": rate}
        (folder / "evaluation.jsonl").write_text(json.dumps(result) + "\n")
    os.utime(folder / "metrics.jsonl", (time.time() - seconds_ago,) * 2)
    return folder


def cells(text: str) -> list[list[str]]:
    return [[cell for cell in line.split("  ") if cell.strip()] for line in text.splitlines() if line.strip()]


def test_a_wide_table_is_whole_where_it_is_piped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / f"a_run_with_a_rather_long_name_{number}", steps=5) for number in range(12)]
    assert main(["compare", *map(str, runs)]) == 0
    out = capsys.readouterr().out
    assert all(run.name in out for run in runs)
    assert "…" not in out


def test_runs_are_compared_by_results_and_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = write_run(tmp_path / "a" / "one")
    second = write_run(tmp_path / "a" / "two", rate=0.02, steps=20, skipped_steps=3)
    third = write_run(tmp_path / "b" / "one", steps=5, loss=None)
    page = tmp_path / "page.html"
    assert main(["compare", *map(str, (first, second, third)), "--out", str(page)]) == 0
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in cells(capsys.readouterr().out)}
    assert rows["a/one"] == ["a/two", "b/one"]
    assert rows["accuracy, lfw"] == ["0.9000 ± 0.0100", "0.9800 ± 0.0100", "–"]
    assert rows["steps"] == ["40", "20", "5"]
    assert rows["loss, last logged"] == ["0.5000", "1.0000", "5.0000"]
    assert rows["images/s, median"] == ["1,020", "1,010", "1,003"]
    assert rows["skipped steps"] == ["0", "3", "0"]
    assert rows["head.sample_rate"] == ["0.1", "0.02", "0.1"]
    assert "run.name" not in rows
    assert "head.objective.margin" not in rows
    text = page.read_text()
    for told in ("Runs compared", "head.sample_rate", "a/two", "accuracy, lfw", "data:image/svg"):
        assert told in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_equal_configurations_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(write_run(tmp_path / name)) for name in ("one", "two")]
    assert main(["compare", *runs]) == 0
    assert "the configurations are the same" in capsys.readouterr().out


def test_what_cannot_be_compared_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, page = write_run(tmp_path / "one"), tmp_path / "page.html"
    page.write_text("mine")
    for arguments, message in (
        (["compare", str(run), str(tmp_path)], "is not a run directory"),
        (["compare", str(run), str(tmp_path / "x" / ".." / "one")], "is given twice"),
        (["compare", str(run), "--out", str(page)], "exists already"),
        (["watch", str(tmp_path / "nothing")], "is no run, and no folder of runs"),
    ):
        assert main(arguments) == 2
        assert message in capsys.readouterr().err
    assert page.read_text() == "mine"


def test_watch_shows_each_run_on_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "done")
    write_run(tmp_path / "runs" / "going", steps=30, seconds_ago=65.0, rollbacks=2, damaged_records=1)
    (tmp_path / "runs" / "new").mkdir()
    (tmp_path / "runs" / "new" / "config.yaml").write_text("schedule: {epochs: 3}\n")
    single = write_run(tmp_path / "single", steps=5)
    assert main(["watch", str(tmp_path / "runs"), str(single), "--once"]) == 0
    rows = {line[0].strip(): [cell.strip() for cell in line[1:]] for line in cells(capsys.readouterr().out)}
    assert list(rows) == ["run", "done", "going", "new", "single"]
    assert rows["done"][:3] == ["40/40", "100%", "0.5000"]
    assert rows["done"][-1] == "done"
    assert rows["going"][-2:] == ["rollbacks 2, damaged records 1", "1:05 ago"]
    assert any(cell.startswith("lfw 0.9000 ± 0.0100") for cell in rows["going"])
    assert rows["new"] == ["0"]
    assert rows["single"][:2] == ["5/40", "12%"]
