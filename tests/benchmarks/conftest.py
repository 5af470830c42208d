"""The small data set of the command line's tests; what makes measurements quick where their numbers are not tested."""

import pytest

from pfc.benchmarks.ceilings import Ceilings
from tests.commands import forkserver


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that are known beforehand, in place of seconds of measuring."""
    known = Ceilings(2, {"float32": 1e11, "bf16": 2e11}, 1e10)
    monkeypatch.setattr("pfc.benchmarks.head.grid.measure_ceilings", lambda *_, **__: known)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that have torch from the start, where a user's import it; and the profiler is as quiet as there."""
    monkeypatch.setenv("KINETO_LOG_LEVEL", "99")  # read when torch is loaded, which the forkserver does on first use
    monkeypatch.setattr("pfc.benchmarks.ranks.mp.get_context", lambda _: forkserver())
