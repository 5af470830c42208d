"""`pfc bench head`: beside a dense head and a peer, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from pfc.benchmarks.ceilings import Ceilings
from pfc.benchmarks.head import memory
from pfc.benchmarks.head.case import HeadCase, Measurement
from pfc.benchmarks.head.dense import MARGIN, SCALE, DenseHead
from pfc.benchmarks.head.grid import HeadGrid, HeadResults
from pfc.benchmarks.head.phases import KINDS, PARTS
from pfc.benchmarks.head.table import report
from pfc.benchmarks.ranks import Rank, RankDied, run
from pfc.launch.cli import main
from pfc.partial_fc import PartialFC, RowSGD
from pfc.partial_fc.objectives import CosFace
from tests.ranks import run_ranks

SMALL = ["--classes", "300", "--dim", "16", "--batch", "8", "--steps", "2", "--warmup", "1", "--rounds", "1"]


LOSSES = """
class CombinedMarginLoss:
    def __init__(self, s, m1, m2, m3):
        assert (s, m1, m2, m3) == (64, 1.0, 0.0, 0.35)
"""


STAND_IN = """
import warnings, os
import torch

class PartialFC_V2(torch.nn.Module):
    def __init__(self, margin_loss, embedding_size, num_classes, sample_rate, fp16):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(num_classes, embedding_size).cuda())

    def forward(self, embeddings, labels):
        warnings.warn("this is old", FutureWarning)
        {body}
        return (embeddings @ self.weight.T).logsumexp(dim=1).mean()
"""


def stand_in(folder: Path, body: str = "") -> str:
    """A folder with a head of the common implementation's interface."""
    (folder / "losses.py").write_text(LOSSES)
    (folder / "partial_fc_v2.py").write_text(STAND_IN.format(body=body))
    return str(folder)


@pytest.mark.usefixtures("quick", "forked")
def test_head_beside_dense_and_peer(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, picture, peer = tmp_path / "head.json", tmp_path / "head.png", stand_in(tmp_path)
    options = ["--rate", "0.5", "--peer", peer, "--json", str(file), "--plot", str(picture)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main(["bench", "head", *SMALL, *options]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""  # not the stand-in's warning
    lines = captured.out.splitlines()
    assert all(len(line) <= 120 for line in lines)
    heads = [line.split()[0] for line in lines if line.startswith(("dense", "peer", "pfc"))]
    assert heads == 2 * ["dense", "peer", "pfc"]
    assert picture.read_bytes().startswith(b"\x89PNG")

    found = json.loads(file.read_text())
    assert found["ceilings"] == [{"ranks": 2, "products_per_s": {"float32": 1e11, "bf16": 2e11}, "bytes_per_s": 1e10}]
    dense, theirs, ours = found["lines"]
    assert [(line["head"], line["rate"]) for line in found["lines"]] == [("dense", 1.0), ("peer", 0.5), ("pfc", 0.5)]
    for line in found["lines"]:
        assert 0 < line["min_s"] <= line["median_s"] <= line["max_s"]
        assert line["times_floor"] == pytest.approx(line["median_s"] / line["floor_s"])
        assert line["peak_bytes"] > 0
        assert line["phases"].keys() == set(PARTS)
        assert all(kinds.keys() == set(KINDS) for kinds in line["phases"].values())
        assert sum(share for kinds in line["phases"].values() for share in kinds.values()) == pytest.approx(1)
    assert ours["times_dense"] == pytest.approx(dense["median_s"] / ours["median_s"])
    assert ours["times_peer"] == pytest.approx(theirs["median_s"] / ours["median_s"])
    assert ours["memory_of_peer"] == pytest.approx(ours["peak_bytes"] / theirs["peak_bytes"])
    assert ours["phases"]["forward"]["sample"] > 0
    assert ours["phases"]["forward"]["exchange"] > 0
    assert ours["phases"]["forward"]["products"] > 0
    assert ours["phases"]["update"]["products"] > 0


@pytest.mark.usefixtures("quick", "forked")
def test_a_rank_that_dies_leaves_the_other_lines_alone(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file, told = tmp_path / "head.json", "a rank was killed by SIGKILL; the machine may have run out of memory"
    body = "os.kill(os.getpid(), 9) if torch.distributed.get_rank() else torch.distributed.barrier()"
    options = ["--rate", "1", "--no-dense", "--peer", stand_in(tmp_path, body), "--json", str(file)]
    assert main(["bench", "head", *SMALL, *options]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("pfc: peer C=300 rate=1 B=8 D=16 ranks=2")
    assert told in line
    theirs, ours = json.loads(file.read_text())["lines"]
    assert told in theirs["error"]
    assert ours["median_s"] > 0
    assert ours["times_peer"] is None


def test_every_combination_is_a_line_and_every_baseline_only_one() -> None:
    both = ("float32", "bf16")
    grid = HeadGrid(classes=(100, 200), sampled=(50,), precision=both, objective=("cosface", "d_softmax"))
    lines = [line.case for line in grid.lines()]
    assert [(case.classes, case.precision) for case in lines if case.head == "dense"] == [
        (100, "float32"),
        (100, "bf16"),
        (200, "float32"),
        (200, "bf16"),
    ]
    ours = [case for case in lines if case.head == "pfc"]
    assert len(ours) == len(set(ours)) == 8
    assert {(case.classes, case.rate) for case in ours} == {(100, 0.5), (200, 0.25)}


def test_the_widest_table_fits_the_screen() -> None:
    """Everything varies, the numbers are large."""
    known = Ceilings(8, {"float32": 1e14, "bf16": 1e15}, 3e12)
    grid = HeadGrid(
        classes=(10_000_000, 2_000_000),
        rate=(1.0, 0.015625),
        batch=(1024, 4096),
        dim=(512, 1024),
        ranks=(2, 8),
        precision=("float32", "bf16"),
        objective=("cosface", "d_softmax"),
        peer="somewhere",
    )
    lines = grid.lines()
    for line in lines:
        phases = {part: dict.fromkeys(KINDS, 1.0) for part in PARTS}
        line.rounds, line.ceilings = [Measurement([12.3456, 123.4567], 99 << 30, phases)], known
    told = report(HeadResults(grid, [known], lines))
    assert len(told) > 2 * len(lines)
    assert max(map(len, told)) <= 120


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "7"], "--batch 7 does not divide into 2 ranks"),
        (["--precision", "fp8"], "--precision fp8: float32 or bf16"),
        (["--peer", "nowhere"], "--peer nowhere: no partial_fc_v2.py there"),
        (["--rate", "2"], "--rate 2.0: must lie in (0, 1]"),
        (["--rate", "0.5", "--sampled", "10"], "give --rate or --sampled, not both"),
        (["--classes", "10", "--sampled", "11"], "--sampled 11: more than --classes 10"),
        (["--objective", "face"], "--objective face: not one of softmax, "),
        (["--json", "nowhere/head.json"], "nowhere/head.json: no folder "),
        (["--plot", "head.doc"], "--plot head.doc: must end in .png, .pdf or .svg"),
        (["--classes", "1000000000000"], "pfc with 1,000,000,000,000 classes of 512 numbers needs about 38"),
    ],
)
def test_wrong_use(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "head", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_baseline_that_does_not_fit_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 ranks of 500 rows of 1024 numbers: 4 MB of centers and momentum a rank, the dense head's copies take 14 MB.
    monkeypatch.setattr(memory, "_BASE", 0)
    monkeypatch.setattr(memory, "bytes_free", lambda: 12_000_000)
    ours, dense = (HeadCase(head, 1000, dim=1024, batch=8) for head in ("pfc", "dense"))
    assert memory.bytes_needed(ours) == 2 * 4 * 500 * 1024 + 4 * 8 * 500 + 10 * 4 * 8 * 1024
    assert memory.why_not(ours) == ""
    assert memory.why_not(dense).startswith(
        "dense with 1,000 classes of 1024 numbers needs about 0.0 GiB of memory on 2 rank(s)"
    )


def test_the_dense_head_is_the_same_head() -> None:
    for loss, expected, gradient, expected_gradient, rows, stepped in run_ranks(2, _dense_and_sampled):
        assert loss == pytest.approx(expected, rel=1e-5)
        assert torch.allclose(gradient, expected_gradient, rtol=1e-3, atol=1e-6)
        assert torch.allclose(rows, stepped, rtol=1e-3, atol=1e-6)


def _dense_and_sampled() -> tuple[Any, ...]:
    """Loss, gradient and stepped centers of the dense head and of ours, one step from the same centers."""
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    ours = PartialFC(11, 8, objective=CosFace(scale=SCALE, margin=MARGIN))
    dense = DenseHead(11, 8, torch.float32, torch.device("cpu"))
    dense.weight.data.copy_(ours.weight.data)
    values, labels = torch.randn(4, 8, generator=generator), torch.randint(11, (4,), generator=generator)
    results = []
    for head, optimizer in ((dense, torch.optim.SGD([dense.weight], lr=1e-3)), (ours, RowSGD(ours, lr=1e-3))):
        embeddings = values.clone().requires_grad_()
        loss = head(embeddings, labels)
        loss.backward()
        optimizer.step()
        results.append((loss.item(), embeddings.grad, head.weight.data))
    return tuple(part for pair in zip(*results, strict=True) for part in pair)


def _of_rank(rank: Rank, what: str) -> dict[str, Any]:
    if what == "peak":
        before = rank.reset_peak()
        held = bytearray(64 << 20)
        held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])
        del held
        return {"peak": rank.peak() - before}
    if what == "raise":
        raise ValueError("no such thing\nand more of it")
    if rank.number == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    rank.wait()
    return {}


@pytest.mark.usefixtures("forked")
def test_the_peak_is_that_of_the_measured_work() -> None:
    (found,) = run(_of_rank, 1, 1, "peak")
    assert 60 << 20 < found["peak"] < 80 << 20  # the kernel counts in batches of pages


@pytest.mark.usefixtures("forked")
def test_the_killed_rank_is_the_cause_and_not_the_one_that_missed_it() -> None:
    with pytest.raises(RankDied, match=r"^a rank was killed by SIGSEGV$"):
        run(_of_rank, 2, 1, "die")


def test_an_exception_is_told_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RankDied, match=r"^ValueError: no such thing$"):
        run(_of_rank, 1, 1, "raise")
    assert capfd.readouterr().err == ""


def test_the_head_is_measured_with_torch_alone() -> None:
    code = """
import sys
hidden = ("pydantic", "yaml", "typer", "rich", "nvidia", "matplotlib", "sklearn", "PIL", "tensorboard", "jinja2")
class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in hidden and not name.startswith("nvidia.cu"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Without())
sys.argv = ["bench", "--help"]
import runpy
runpy.run_module("pfc.benchmarks.head", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "--sampled" in done.stdout
