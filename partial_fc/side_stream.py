"""The row update on a stream of its own, at the same time as the backbone's backward pass, of which it needs nothing.

A CPU takes the same calls, where torch.cpu's streams do each at once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from . import device


class SideStream:
    """A second stream for work that begins at a mark in the current one, which goes on without waiting.

    Args:
        where: its device.
    """

    def __init__(self, where: torch.device) -> None:
        self.device = where
        self._streams = device.streams(where)
        with device.selected(where):
            self._stream = self._streams.Stream()
        self._mark: Any = None  # an event; a CPU has none
        self._scale: tuple[Tensor | None, int] = None, 0
        self._done: Any = None
        self._main: Any = None  # the stream that went on meanwhile
        self._in_use: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return SideStream, (self.device,)  # a copy of the head gets a stream of its own

    def mark(self, scale: Tensor) -> None:
        """From here on, in the current stream, everything is there that the work needs.

        Args:
            scale: what the gradients were multiplied with; GradScaler, or who clips, may change it later.
        """
        self._scale = scale, scale._version
        self._mark = self._current().record_event()

    @contextmanager
    def running(self, scale: Tensor | None, in_use: tuple[Any, ...], *, late: bool) -> Iterator[None]:
        """What is called inside runs on the second stream, from the mark on where nothing that it needs changed since.

        Args:
            scale: as it is now.
            in_use: what else holds memory that it reads; referenced until the next ``join``.
            late: whether it needs something that came after the mark.
        """
        marked, version = self._scale
        self._main = self._current()
        if scale is marked and marked is not None and marked._version == version and not late:
            self._stream.wait_event(self._mark)
        else:
            self._stream.wait_stream(self._main)
        self._in_use += (scale, *in_use)
        try:
            with self._streams.stream(self._stream):
                yield
        finally:
            self._done = self._stream.record_event()
        if self._done is None:  # a CPU's work is done
            self._in_use = ()

    def join(self) -> None:
        """What the current stream does next waits for it; and what runs next, for all that was queued until then."""
        current = self._current()
        if self._done is not None:
            current.wait_event(self._done)
        if self._main is None or current == self._main:  # memory that is freed goes back to that stream
            self._in_use = ()
        self._scale = None, 0

    def _current(self) -> Any:
        return self._streams.current_stream(self.device)
