"""The sets that a run is judged by: verification pairs and protocols, and what is written down of each."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import nn

from ...data import read_pairs
from ...data.atomic import replacing
from ...data.errors import UsageError
from ...data.protocols.images import WhenAsked, open_images
from ...data.protocols.table import read_protocol
from ..build import input_size
from ..config import Config
from ..ranks.distributed import World
from ..report.record import SCORES
from ..training_data import decoding_threads
from .evaluate import VerificationResult, evaluate_pairs
from .intervals import SAMPLES
from .judgement import How, Judgement
from .protocol import embed_protocol, judge


class EvaluationSets:
    """What ``evaluation`` of a configuration names, read; on every rank.

    Attributes:
        names: of all sets, each different.

    Raises:
        UsageError: one cannot be read, or two have the same name.
    """

    def __init__(self, config: Config) -> None:
        self._pairs = [read_pairs(path) for path in config.evaluation.pairs]
        self._protocols = [read_protocol(Path(path)) for path in config.evaluation.sets]
        for protocol in self._protocols:
            open_images(protocol.images, protocol.folder)  # says what is missing before anything is trained
        self._images: dict[str, WhenAsked] = {}
        self.names = [one.name for one in (*self._pairs, *self._protocols)]
        for name in self.names:
            if self.names.count(name) > 1:
                raise UsageError(f"evaluation: two sets are called {name!r}: rename one of the files")
        self._slow: set[str] = set()

    def evaluate(
        self,
        network: nn.Module,
        config: Config,
        world: World,
        *,
        step: int,
        last: bool,
        autocast: Callable[[], AbstractContextManager[object]],
        tolerating: Callable[[Path], AbstractContextManager[None]],
        message: Callable[[str], None],
    ) -> Iterator[tuple[VerificationResult | Judgement, float]]:
        """Evaluates one set after the other, by all ranks, and writes what the report needs of it.

        Args:
            network: from images to embeddings.
            config: of the run, completed.
            step: the number of the step, for the files' names.
            last: whether it is the last one, at which no set is left out.
            autocast: the arithmetic of the network.
            tolerating: in which a file may fail to be written.
            message: prints a line.

        Yields:
            what was found, and the seconds that it took, the same on every rank. A protocol of which an image can no
            longer be read is told and left out.

        Raises:
            UsageError: of a protocol that was not evaluated before an image cannot be read.
            RuntimeError: an embedding is not finite.
        """
        folder = config.run.path / SCORES

        def written(name: str, write: Callable[[IO[bytes]], object]) -> None:
            if world.is_main:
                with tolerating(folder):
                    folder.mkdir(exist_ok=True)
                    with replacing(folder / f"{name}-{step:08d}.npz") as unfinished, unfinished.open("wb") as file:
                        write(file)

        for pairs in self._pairs:
            begun = time.monotonic()
            world.heartbeat.enter(f"evaluating on {pairs.name}")
            with autocast():
                result, cosine = evaluate_pairs(network, pairs, **_reading(config, world))
            written(pairs.name, partial(np.savez_compressed, cosine=cosine, same=pairs.same))
            yield result, _seconds(world, begun)
        most = config.evaluation.most_seconds
        for protocol in self._protocols:
            if protocol.name in self._slow and not last:
                continue
            begun = time.monotonic()
            world.heartbeat.enter(f"evaluating on {protocol.name}")
            size, first = input_size(config), protocol.name not in self._images
            if first:
                self._images[protocol.name] = open_images(protocol.images, protocol.folder, protocol.landmarks, size)
            try:
                with autocast():
                    embeddings = embed_protocol(
                        network, protocol, self._images[protocol.name], **_reading(config, world)
                    )
            except UsageError as error:  # on every rank
                if first:
                    raise
                message(f"warning    {protocol.name} is not evaluated: {error}")
                continue
            if not torch.isfinite(embeddings).all():
                raise RuntimeError(
                    f"evaluation on {protocol.name!r}: embeddings are not finite, so training has diverged: "
                    "lower the learning rate, or train with precision float32"
                )
            how = How(world.device, samples=SAMPLES if last else 0, moved=world.heartbeat.moved)
            judgement = judge(protocol, embeddings, how)
            written(protocol.name, judgement.save)
            seconds = _seconds(world, begun)
            yield judgement, seconds
            if most is not None and seconds > most and not last:
                self._slow.add(protocol.name)
                message(
                    f"evaluated  {protocol.name} took {seconds:.0f} s, more than evaluation.most_seconds ({most:g}): "
                    "from now on at the last step alone"
                )


def _reading(config: Config, world: World) -> dict[str, Any]:
    section = config.evaluation
    return {
        "image_size": input_size(config),
        "device": world.device,
        "batch_size": section.batch_size,
        "flip": section.flip,
        "threads": decoding_threads(config),
        "moved": world.heartbeat.moved,
    }


def _seconds(world: World, begun: float) -> float:
    """Of the slowest rank."""
    return world.largest(int(1000 * (time.monotonic() - begun)))[0] / 1000
