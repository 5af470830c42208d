"""What all tests share: one thread a process, quick collection, and the table at the end of ``make test-gpu``."""

import gc
import os
from collections.abc import Iterator

import pytest

# Before anything imports torch: tests work on small tensors, which more threads make slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()  # what is imported stays: to look for garbage in it is a third of the time
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("markexpr") != "gpu":
        return
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: what runs on the CPU in its place"
    terminalreporter.section(f"proved on: {name}")
    rows = [
        (outcome, f"{getattr(report, 'duration', 0.0):6.1f} s", report.nodeid.removeprefix("tests/"), _reason(report))
        for outcome in ("failed", "error", "skipped", "passed")
        for report in terminalreporter.getreports(outcome)
        if outcome != "passed" or report.when == "call"
    ]
    for row in rows:
        terminalreporter.write_line("  ".join(row))
    for outcome in ("passed", "failed", "error", "skipped"):
        terminalreporter.write_line(f"{outcome}: {sum(row[0] == outcome for row in rows)}")


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why it was skipped."""
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""
