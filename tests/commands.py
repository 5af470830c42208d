"""Commands for tests: forks of one process that has imported torch, so that each starts at once."""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


def forkserver() -> Any:
    """The multiprocessing context whose processes have ``tests.preloaded`` imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    return context


@dataclass
class Ended:
    """How a command ended."""

    exit_code: int
    out: str
    error: str

    @property
    def output(self) -> str:
        """Of stdout and stderr together, in the order written, where the command was started so."""
        return self.out + self.error

    @property
    def last(self) -> str:
        return self.output.rstrip().splitlines()[-1]


class Command:
    """A running command, with what it prints kept in files."""

    def __init__(
        self,
        function: Callable[..., int | None],
        *arguments: Any,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        merged: bool = False,
    ) -> None:
        """Starts ``function(*arguments)`` as the leader of a session of its own; what it returns is the exit code.

        Args:
            environment: variables in place of this process's, or beside them.
            folder: where it runs; this process's own by default.
            merged: stderr goes where stdout goes.
        """
        self._printed = tempfile.TemporaryDirectory(prefix="pfc-test-")
        self.out = Path(self._printed.name) / "out"
        self.error = self.out if merged else Path(self._printed.name) / "error"
        place = str(folder or Path.cwd())
        variables = os.environ | (environment or {})
        self._process = forkserver().Process(
            target=_run, args=(function, arguments, dict(variables), place, str(self.out), str(self.error))
        )
        self._process.start()
        self.pid: int = self._process.pid

    def poll(self) -> int | None:
        """As subprocess has it: None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait(self, timeout: float = 120.0) -> Ended:
        """Its end; everything that it started is killed with it where it takes longer than ``timeout`` seconds."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()
            raise subprocess.TimeoutExpired(self.printed(), timeout)
        return Ended(code, self.out.read_text(), "" if self.error == self.out else self.error.read_text())

    def printed(self) -> str:
        """What it has printed so far, to stdout and stderr."""
        return "".join(path.read_text() for path in {self.out, self.error} if path.exists())


def pfc(*arguments: str | Path, timeout: float = 120.0, **options: Any) -> Ended:
    """Runs ``pfc ARGUMENTS...`` to its end; options are those of ``Command``."""
    return start_pfc(*arguments, **options).wait(timeout)


def start_pfc(*arguments: str | Path, **options: Any) -> Command:
    """The same, without waiting for its end."""
    return Command(run_pfc, [str(argument) for argument in arguments], **options)


def run_pfc(arguments: Sequence[str]) -> int:
    """In the process of the command."""
    from pfc.launch.cli import main

    return main(arguments)


def run_script(path: str) -> None:
    """Runs a Python file as ``python PATH`` does."""
    runpy.run_path(path, run_name="__main__")


def run_code(code: str) -> None:
    """Runs ``code`` as ``python -c CODE`` does, except that much is imported already."""
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def wait_until(happened: Callable[[], object], seconds: float = 60.0, *, otherwise: str = "it did not happen") -> None:
    """Until ``happened()`` is true; an AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def torchrun(*arguments: str, **options: Any) -> Command:
    """Starts ``torchrun ARGUMENTS...``; its ranks are processes of their own, which import torch themselves."""
    return Command(_torchrun, list(arguments), **options)


def _torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import main

    main(arguments)


def _run(
    function: Callable[..., int | None],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    folder: str,
    out: str,
    error: str,
) -> None:
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts background processes with it ignored
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in enumerate((out, error), start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.exit(function(*arguments))
