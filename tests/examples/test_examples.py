"""The examples: each trains on two ranks, and all come to the same losses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent.parent / "examples"


def losses(name: str, *arguments: str) -> dict[int, float]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command += ["--rdzv-endpoint", "localhost:0", "--local-addr", "localhost", str(EXAMPLES / f"{name}.py"), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", done.stdout)}


def test_the_head_learns_the_same_in_every_trainer(tmp_path: Path) -> None:
    for library in ("lightning", "accelerate"):
        pytest.importorskip(library)
    plain = losses("plain_loop", str(tmp_path / "checkpoint"))
    assert list(plain) == [10, 20, 30, 40]
    assert plain[40] < 0.8 * plain[10]
    assert (tmp_path / "checkpoint" / ".metadata").exists()
    for name in ("lightning_module", "accelerate_loop", "fsdp2_loop"):
        found = losses(name)
        assert found[10] == pytest.approx(plain[10], rel=1e-4), name
        # Rounding grows: Accelerate deals the same batch out in another order.
        assert found == pytest.approx(plain, rel=1e-2), name


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) < 60, path.name
