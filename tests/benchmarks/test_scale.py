"""`pfc bench scale`: what fits and what does not, and one rank of a world that is not there."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pfc.benchmarks.head import memory
from pfc.benchmarks.head.case import HeadCase
from pfc.benchmarks.head.heads import build
from pfc.benchmarks.ranks import simulate_world
from pfc.benchmarks.scale.sweep import Sweep
from pfc.launch.cli import main
from pfc.partial_fc import exchange
from tests.benchmarks.test_head import stand_in

SMALL = ["--dim", "16", "--batch", "4", "--steps", "1", "--warmup", "0", "--rounds", "1"]


@pytest.mark.usefixtures("quick", "forked")
def test_what_does_not_fit_is_shown_beside_what_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_BASE", 0)
    output, peer = tmp_path / "out", tmp_path / "peer"
    peer.mkdir()
    body = "os.kill(os.getpid(), 9)"
    classes = ["--classes", "300", "--classes", "200000", "--rows", "30"]
    options = [*SMALL, *classes, "--memory", "0.04", "--peer", stand_in(peer, body), "--simulate", "8"]
    assert main(["bench", "scale", *options, "--ranks", "2", "--output", str(output)]) == 1  # the peer died
    told = capsys.readouterr().out
    assert told == (output / "scale.txt").read_text()
    told, reasons = told.rsplit("\n\n", 1)
    assert max(map(len, told.splitlines())) <= 120
    assert "does not fit" in told
    assert "needs about 0.1 GiB of memory on 2 rank(s), 0.0 GiB may be taken" in reasons
    assert (output / "scale.png").read_bytes().startswith(b"\x89PNG")
    lines = json.loads((output / "scale.json").read_text())["lines"]
    found = [(line["head"], line["classes"], line["simulated"], line.get("error", "")[:9]) for line in lines]
    assert found == [
        ("dense", 300, False, ""),
        ("peer", 300, False, "peer C=30"),
        ("pfc", 300, False, ""),
        ("dense", 200_000, False, "dense wit"),
        ("peer", 200_000, False, "peer with"),
        ("pfc", 200_000, False, ""),
        ("pfc", 300, True, ""),
        ("pfc", 200_000, True, ""),
    ]
    assert all(line["samples_per_s"] == line["batch"] / line["min_s"] for line in lines if "error" not in line)
    assert lines[6]["batch"] == 8 * 4  # the simulated world's
    assert lines[6]["stored_rows"] == 38
    assert lines[3]["needed_bytes"] > lines[5]["needed_bytes"] > lines[7]["needed_bytes"]


@pytest.mark.usefixtures("quick", "forked")
def test_centers_are_measured_where_they_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--classes", "3000", "--no-dense", "--storage", "host", "--storage", "file", "--center-dtype", "bf16"]
    assert main(["bench", "scale", *SMALL, *options, "--ranks", "1", "--output", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("pfc")]
    assert [row[:5] for row in rows] == [["pfc", "3,000", "0.1", where, "bf16"] for where in ("host", "file")]
    assert {file.name for file in tmp_path.iterdir()} == {"scale.txt", "scale.json", "scale.png"}


def test_a_file_takes_room_on_the_disk_and_not_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_BASE", 0)
    monkeypatch.setattr(memory, "bytes_free", lambda: 2 << 30)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda _: SimpleNamespace(free=100 << 30))
    # 2 ranks of 5 million rows of 64 numbers and their momentum: 2.4 GiB each.
    device = HeadCase("pfc", 10_000_000, dim=64, batch=8, rate=1e-6)
    file = replace(device, storage="file", storage_dir=str(tmp_path))
    assert device.row_bytes == 512
    used = memory.expected_rows(10_000_000, 2, 1e-6, 8)
    assert memory.bytes_needed(file) == pytest.approx(2 * 512 * used + 10 * 4 * 8 * 64 + 4 * 8 * used, abs=1)
    assert memory.bytes_needed(device) == pytest.approx(512 * 5_000_000, rel=1e-3)
    assert "needs about 4.8 GiB of memory on 2 rank(s), 1.9 GiB may be taken" in memory.why_not(device)
    assert memory.why_not(file) == ""
    larger = replace(file, classes=1_000_000_000, rate=1e-8)
    assert f"needs about 476.8 GiB in {tmp_path} on 2 rank(s), 95.0 GiB may be taken" in memory.why_not(larger)


@pytest.fixture
def world() -> Iterator[int]:
    simulate_world(8)
    yield 8
    dist.destroy_process_group()


def test_a_simulated_rank_has_the_sizes_that_are_counted(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = HeadCase("pfc", 100_003, dim=16, batch=world * 32, rate=0.1, ranks=world, simulated=True)
    head = build(case, torch.device("cpu"))
    exchanged = []

    def spy(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def counting(*tensors: torch.Tensor, **options: Any) -> Any:
            exchanged.append(max(tensor.nbytes for tensor in tensors))
            return call(*tensors, **options)

        monkeypatch.setattr(owner, name, counting)

    spy(exchange, "_all_gather")
    spy(exchange, "_reduce_scatter")
    spy(exchange.dist, "all_reduce")
    before = head.module.weight.detach().clone()
    head.step(torch.randn(32, 16, requires_grad=True), torch.randint(100_003, (32,)))
    assert sum(exchanged) == case.exchanged_bytes
    assert head.module.weight.shape == (case.stored_rows, 16) == (12_501, 16)
    # The share of the rank's classes, and of the 256 labels of the whole batch those that are its own and not sampled.
    assert abs(head.used_rows - case.work.rows) < 15
    assert (head.module.weight != before).any(dim=1).sum() == head.used_rows
    state = sum(state.nbytes for state in head.optimizer._row_state().values())
    assert head.module.weight.nbytes + state == 12_501 * case.row_bytes


def test_storages_and_precisions_are_lines_of_ours_alone() -> None:
    sweep = Sweep(
        classes=(100,), ranks=(2, 4), simulate=(8,), center_dtype=("float32", "bf16"), optimizer="row_adagrad"
    )
    found = [(case.head, case.ranks, case.batch, case.center_dtype, case.simulated) for case in _cases(sweep)]
    assert found == [
        ("dense", 2, 128, "float32", False),
        ("pfc", 2, 128, "float32", False),
        ("pfc", 2, 128, "bf16", False),
        ("dense", 4, 256, "float32", False),
        ("pfc", 4, 256, "float32", False),
        ("pfc", 4, 256, "bf16", False),
        ("pfc", 8, 512, "float32", True),
        ("pfc", 8, 512, "bf16", True),
    ]
    assert [case.row_bytes for case in _cases(sweep) if case.head == "pfc"] == 3 * [4 * 512 + 4, 2 * 512 + 4]


def _cases(sweep: Sweep) -> list[HeadCase]:
    return [line.case for line in sweep.lines()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rate", "0.5", "--rows", "10"], "give --rate or --rows, not both"),
        (["--classes", "10", "--rows", "11"], "--rows 11: more than --classes 10"),
        (["--simulate", "1"], "--simulate 1: must be at least 2"),
        (["--center-dtype", "fp8"], "--center-dtype fp8: float32 or bf16"),
        (["--storage", "tape"], "--storage tape: device or host or file"),
        (["--optimizer", "sgd"], "--optimizer sgd: row_sgd or row_adagrad"),
        (["--output", "nowhere/scale"], "nowhere/scale: no folder "),
    ],
)
def test_wrong_use(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "scale", *options]) == 2
    assert message in capsys.readouterr().err
