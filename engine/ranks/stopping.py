"""Signals that ask a run to stop: the step in hand is finished and saved, and the exit code says what was asked."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

EXIT_CODES = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGUSR1: os.EX_TEMPFAIL}
"""SIGUSR1 is the warning of a cluster whose time is over: code 75 asks to be started again."""


class StopRequests:
    """The signals that have come so far."""

    def __init__(self) -> None:
        self._received: set[int] = set()

    @property
    def most(self) -> int:
        """What is asked for, as a number of which the largest over all ranks counts: 0 nothing, then SIGTERM, then
        SIGUSR1, because a run that wants to go on should not be forgotten."""
        return max((place for place, number in enumerate(EXIT_CODES, 1) if number in self._received), default=0)

    def collect(self, number: int, _: FrameType | None) -> None:
        self._received.add(number)


def signal_of(most: int) -> signal.Signals | None:
    """The signal that ``StopRequests.most`` stands for."""
    return list(EXIT_CODES)[most - 1] if most else None


@contextmanager
def stop_requests() -> Iterator[StopRequests]:
    """Collects SIGTERM and SIGUSR1 instead of dying of them."""
    requests = StopRequests()
    previous = {number: signal.signal(number, requests.collect) for number in EXIT_CODES}
    try:
        yield requests
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
