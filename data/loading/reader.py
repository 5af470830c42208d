"""Reads one rank's slices of the global batches, and puts good samples in the place of damaged ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from ..errors import DamagedRecord
from ..order.orders import Integers, Order
from ..records.dataset import RecordDataset
from ..records.joint import JointDataset
from .damage import too_many
from .headers import header_problem, header_size
from .plain import PlainRecords

_PLANNED = 2048  # samples whose places in the order are computed at once: numpy's cost a call is then small
AHEAD = 2048  # samples that the system is asked for before they are read: a disk then has many reads to choose from
_AHEAD_BYTES = 1 << 26  # that they take together at most
_ATTEMPTS = 1000  # damaged samples in a row before the search for a good one is given up


Dataset = RecordDataset | JointDataset


@dataclass
class Slice:
    """One rank's b samples of a global batch, damaged ones replaced.

    Attributes:
        start, end: position of the global batch, and of the one that follows it.
        samples, visits, labels: int64 [b]; (sample, visit) names the picture, see ``Order.visits``.
        images: the encoded images.
        damaged: the samples that were replaced, with what is wrong with them.
        fits: whether all images have the reader's ``image_size``; true if it has none.
    """

    start: int
    end: int
    samples: Integers
    visits: Integers
    labels: Integers
    images: Sequence[NDArray[np.uint8]]
    damaged: list[tuple[int, DamagedRecord]]
    fits: bool


class SliceReader:
    """Reads slice after slice from ``position`` on.

    A sample that cannot be read is replaced by the sample of another position, which ``Order.substitute`` names, and so
    on until one is good. So what a batch holds depends on the data and the order alone.
    """

    def __init__(
        self,
        dataset: Dataset,
        order: Order,
        *,
        batch_size: int,
        rank: int,
        world_size: int,
        drop: bool,
        position: int,
        image_size: tuple[int, int] | None,
    ) -> None:
        self._image_size = image_size
        self._dataset, self._order, self._drop = dataset, order, drop
        self._batch_size, self._rank = batch_size, rank
        self._global_batch = batch_size * world_size
        self._plain = PlainRecords(dataset)
        for file in self._plain.files:
            file.expect_random_reads()
        mean = sum(file.size for file in self._plain.files) // len(dataset) + 1
        self._ahead = max(1, min(AHEAD, _AHEAD_BYTES // mean) // batch_size)  # batches
        self._undecodable: dict[int, DamagedRecord] = {}
        self._planned: deque[tuple[int, int, Integers, Integers]] = deque()
        self.rewind(position)

    def rewind(self, position: int) -> None:
        """Go on with the first batch from ``position`` on."""
        self._planned.clear()
        self._asked = 0  # of those that are planned
        self.position = self._plan_from = self._order.batch_start(position, self._global_batch, drop=self._drop)

    @property
    def reads_from(self) -> int:
        """The position where this rank reads next."""
        return self.position + self._rank * self._batch_size

    def mark(self, sample: int, problem: str) -> None:
        """From now on ``sample`` is damaged: its bytes are whole, but they are no image."""
        shard, position = self._dataset.locate(sample)
        self._undecodable[sample] = shard.error(position, f"its image cannot be decoded: {problem}")

    def substitutes(self, slice: Slice, place: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The samples, and their images, that may stand in this place of the slice if those before them are damaged."""
        for _, sample, image in self._candidates(slice.start + self._rank * self._batch_size + place):
            yield sample, image

    def read(self) -> Slice:
        """The next slice. UsageError where no good sample can be found."""
        while len(self._planned) <= self._ahead:
            self._plan()
        for _, _, samples, _ in islice(self._planned, self._asked, self._ahead + 1):
            self._plain.will_need(samples)
        self._asked = self._ahead
        start, self.position, samples, visits = self._planned.popleft()
        plain = self._plain.find(samples)
        labels, odd = plain.labels, plain.labels < 0
        if self._undecodable:
            odd |= np.isin(samples, list(self._undecodable))
        others: dict[int, NDArray[np.uint8]] = {}
        damaged: list[tuple[int, DamagedRecord]] = []
        for place in np.flatnonzero(odd).tolist():
            sample = int(samples[place])
            found = self._try(sample)
            if isinstance(found, DamagedRecord):
                damaged.append((sample, found))
                position = self._substitute(start + self._rank * self._batch_size + place, found)
                samples[place], visits[place] = self._order.at(position)[0], self._order.visits(position)[0]
                found = self._dataset.read(int(samples[place]))
            labels[place], others[place] = found
        images = [others[i] if i in others else plain[i] for i in range(len(plain))] if others else plain
        if self._image_size is None:
            fits = True
        elif images is plain:
            fits = plain.have_size(self._image_size)
        else:
            fits = all(header_size(image) == self._image_size for image in images)
        return Slice(start, self.position, samples, visits, labels, images, damaged, fits)

    def _plan(self) -> None:
        """Looks up the samples of some batches at once."""
        starts, position = [], self._plan_from
        for _ in range(max(1, _PLANNED // self._batch_size)):
            starts.append(position)
            position = self._order.batch_start(position + self._global_batch, self._global_batch, drop=self._drop)
        mine = np.asarray(starts)[:, None] + self._rank * self._batch_size + np.arange(self._batch_size)
        samples = self._order.at(mine.ravel()).reshape(mine.shape)
        visits = self._order.visits(mine.ravel()).reshape(mine.shape)
        self._plan_from = position
        self._planned.extend(zip(starts, [*starts[1:], position], samples, visits, strict=True))

    def _try(self, sample: int) -> tuple[int, NDArray[np.uint8]] | DamagedRecord:
        """Label and image, or what is wrong with them."""
        if sample in self._undecodable:
            return self._undecodable[sample]
        try:
            found = self._dataset.read(sample)
        except DamagedRecord as error:
            return error
        problem = header_problem(found[1])
        if problem is not None:
            self.mark(sample, problem)
            return self._undecodable[sample]
        return found

    def _substitute(self, position: int, damaged: DamagedRecord) -> Integers:
        """The position, int64 [1], whose sample takes the place of the damaged one of ``position``."""
        for other, _, _ in self._candidates(position):
            return other
        raise too_many(self._dataset.name, f"{_ATTEMPTS:,} images in a row", damaged)

    def _candidates(self, position: int) -> Iterator[tuple[Integers, int, NDArray[np.uint8]]]:
        for attempt in range(1, _ATTEMPTS + 1):
            other = np.asarray([self._order.substitute(position, attempt)])
            sample = int(self._order.at(other)[0])
            if not isinstance(found := self._try(sample), DamagedRecord):
                yield other, sample, found[1]
