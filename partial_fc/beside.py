"""The row update on a stream of its own, beside the backbone's backward pass, of which it needs nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class SideStream:
    """A second stream of a GPU for work that begins at a mark in the first one, which goes on without waiting.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._mark: Any = None  # torch.cuda.Event
        self._scale: tuple[Tensor | None, int] = None, 0
        self._done: Any = None
        self._in_use: tuple[Any, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return SideStream, (self.device,)  # a copy of the head gets a stream of its own

    def mark(self, scale: Tensor) -> None:
        """From here on, in the current stream, everything is there that the work needs.

        Args:
            scale: what the gradients were multiplied with; GradScaler, or who clips, may change it later.
        """
        self._scale = scale, scale._version
        self._mark = torch.cuda.current_stream(self.device).record_event()

    @contextmanager
    def running(self, scale: Tensor | None, in_use: tuple[Any, ...], *, late: bool) -> Iterator[None]:
        """What is called inside runs beside, from the mark on where nothing that it needs changed since.

        Args:
            scale: as it is now.
            in_use: what else holds memory that it reads; kept until the next ``join``.
            late: whether it needs something that came after the mark.
        """
        marked, version = self._scale
        if (
            self._mark is not None
            and scale is marked
            and marked is not None
            and marked._version == version
            and not late
        ):
            self._stream.wait_event(self._mark)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
        self._in_use += (scale, *in_use)
        with torch.cuda.stream(self._stream):
            yield
        self._done = self._stream.record_event()

    def join(self) -> None:
        """What the current stream does next waits for it."""
        if self._done is not None:
            torch.cuda.current_stream(self.device).wait_event(self._done)
        self._in_use = ()
