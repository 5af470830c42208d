"""The evaluations of a run: every set of verification pairs, and what is written down of each."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from torch import nn

from ...data import Pairs, read_pairs
from ...data.errors import UsageError
from ..build import decoding_threads, input_size
from ..config import Config
from ..ranks.distributed import World
from ..report.record import SCORES
from .evaluate import VerificationResult, evaluate_pairs


def read_pair_sets(paths: list[str]) -> list[Pairs]:
    """The verification sets of a run. UsageError where one cannot be read, or two have the same name."""
    sets = [read_pairs(path) for path in paths]
    names = [pairs.name for pairs in sets]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"evaluation.pairs: two sets are called {name!r}: rename one of the files")
    return sets


def evaluate_sets(
    network: nn.Module,
    sets: list[Pairs],
    config: Config,
    world: World,
    *,
    step: int,
    autocast: Callable[[], AbstractContextManager[object]],
    tolerating: Callable[[Path], AbstractContextManager[None]],
) -> Iterator[VerificationResult]:
    """Evaluates one set after the other, by all ranks, and writes the cosines of its pairs.

    Args:
        network: from images to embeddings.
        config: of the run, completed.
        step: the number of the step, for the files' names.
        autocast: the arithmetic of the network.
        tolerating: in which a file may fail to be written.
    """
    for pairs in sets:
        world.heartbeat.enter(f"evaluating on {pairs.name}")
        with autocast():
            result, cosine = evaluate_pairs(
                network,
                pairs,
                image_size=input_size(config),
                device=world.device,
                batch_size=config.evaluation.batch_size,
                flip=config.evaluation.flip,
                threads=decoding_threads(config),
                moved=world.heartbeat.moved,
            )
        if world.is_main:
            folder = config.run.path / SCORES
            with tolerating(folder):
                folder.mkdir(exist_ok=True)
                np.savez_compressed(folder / f"{pairs.name}-{step:08d}.npz", cosine=cosine, same=pairs.same)
        yield result
