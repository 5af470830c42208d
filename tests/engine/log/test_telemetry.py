import io
import json

import pytest
from rich.console import Console

from pfc.engine.log.loggers.tensorboard import TensorBoard
from pfc.engine.log.telemetry import MetricsLog, Telemetry, Throughput, clock_time, progress_line, read_json_lines


def steps(path):
    return [line["step"] for line in read_json_lines(path)]


def telemetry(run_dir, output, *, terminal=False, **options):
    console = Console(file=output, force_terminal=terminal, highlight=False, width=40)
    options = {"total_steps": 20_000, "world_size": 2, "is_main": True, **options}
    return Telemetry(run_dir, console=console, **options)


def test_metrics_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": 2.5})
    assert read_json_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.5}]


def test_not_a_number_becomes_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": float("nan"), "norm": float("-inf"), "name": "a"})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "norm": None, "name": "a"}


def test_resuming_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in (10, 20, 30):
        log.write(step, {"loss": 1.0})
    log.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    resumed = MetricsLog(path, resumed_step=20)
    assert resumed.last == {"step": 20, "loss": 1.0}
    resumed.write(21, {"loss": 0.5})
    assert steps(path) == [10, 20, 21]
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_resumed_run_continues_its_elapsed_time_and_its_evaluations(tmp_path):
    first = telemetry(tmp_path, io.StringIO())
    first.log(10, {"loss": 1.0})
    first.evaluation(0, {"set": "held out", "accuracy": 0.5})
    first.evaluation(20, {"set": "held out", "accuracy": 0.9})
    first.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0, "elapsed_seconds": 5000.0}\n')
    second = telemetry(tmp_path, io.StringIO(), resumed_step=10)
    second.log(11, {"loss": 0.9})
    second.close()
    second.close()
    assert read_json_lines(tmp_path / "metrics.jsonl")[-1]["elapsed_seconds"] >= 5000
    assert steps(tmp_path / "evaluation.jsonl") == [0]


def test_the_progress_line_in_a_file_is_plain_and_on_one_line(tmp_path):
    output = io.StringIO()
    run = telemetry(tmp_path, output)
    run.log(1200, {"loss": 12.34561, "lr": 0.098, "images_per_second": 812.4, "data_share": 0.031})
    run.message("saved [bold] to " + "x" * 60)
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("step  1,200/20,000     6%   loss 12.3456   lr 0.0980   812 img/s (406/rank)   data 3%")
    assert lines[1:] == ["saved [bold] to " + "x" * 60]
    assert steps(tmp_path / "metrics.jsonl") == [1200]


def test_the_progress_line_on_a_terminal_is_coloured(tmp_path):
    output = io.StringIO()
    telemetry(tmp_path, output, terminal=True).log(1, {"loss": 1.5})
    assert "\x1b[" in output.getvalue()


def test_progress_line_shows_the_time_left_and_only_what_is_known():
    assert progress_line(5, 10, {"loss": float("nan"), "lr": 1e-5}, 1, 754).plain == (
        "step  5/10    50%   loss nan   lr 1.0e-05   eta 12:34"
    )
    assert progress_line(9, 10, {"images_per_second": 1234.5}, 1, None).plain == "step  9/10    90%   1,234 img/s"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (11554, "3:12:34"), (183600, "2d 03:00")]
)
def test_clock_time(seconds, text):
    assert clock_time(seconds) == text


def test_throughput_counts_images_and_the_share_of_waiting_per_window():
    now = [0.0]
    meter = Throughput(clock=lambda: now[0])
    with meter.waiting():
        now[0] += 1.0
    now[0] += 3.0
    meter.count(64)
    meter.count(64)
    assert meter.take() == {"images_per_second": 32.0, "data_share": 0.25}
    now[0] += 100.0
    meter.restart()
    now[0] += 2.0
    meter.count(10)
    assert meter.take() == {"images_per_second": 5.0, "data_share": 0.0}


def test_other_ranks_write_and_print_nothing(tmp_path):
    output = io.StringIO()
    run = telemetry(tmp_path / "run", output, is_main=False, hooks=[TensorBoard()])
    run.log(1, {"loss": 1.0})
    run.evaluation(1, {"set": "a", "accuracy": 1.0})
    run.message("hello")
    run.close()
    assert output.getvalue() == ""
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_numbers(tmp_path):
    run = telemetry(tmp_path, io.StringIO(), hooks=[TensorBoard()])
    run.log(3, {"loss": 1.25, "note": "text"})
    run.evaluation(3, {"set": "held out", "accuracy": 0.75})
    run.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(3, 1.25)]
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/elapsed_seconds",
        "evaluation/held out/accuracy",
    }


def test_a_missing_tensorboard_is_told_once_and_does_not_stop_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    output = io.StringIO()
    run = telemetry(tmp_path, output, hooks=[TensorBoard()])
    run.log(3, {"loss": 1.25})
    run.close()
    assert output.getvalue().count("pip install tensorboard") == 1
    assert steps(tmp_path / "metrics.jsonl") == [3]
