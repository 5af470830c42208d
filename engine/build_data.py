"""From the data section of a configuration to what a run reads."""

import os

from ..data import JointDataset, RecordDataset, TrainLoader
from ..data.errors import UsageError
from ..data.order.balanced import BalancedOrder, groups_of
from ..data.order.orders import BlockOrder, Order, SampleOrder
from ..data.records.joint import MixedOrder, seed_of_set
from ..data.workers import default_workers
from .config import BalancedSampling, BlockSampling, Config
from .ranks.distributed import World

_MOST_THREADS = 8  # by default: tens of thousands of images of 112×112 a second


def decoding_threads(config: Config) -> int:
    """How many threads this rank decodes with."""
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return config.data.threads or max(1, min(_MOST_THREADS, default_workers() // ranks_here))


def open_dataset(config: Config) -> RecordDataset | JointDataset:
    """The training set, or all of them joined."""
    return JointDataset.open([source.path for source in config.data.sources])


def build_order(config: Config, dataset: RecordDataset | JointDataset, global_batch: int) -> Order:
    """The order of samples."""
    section, seed = config.data.order, config.run.seed
    sets = dataset.sets if isinstance(dataset, JointDataset) else [dataset]
    weights = [source.weight for source in config.data.sources]
    if isinstance(section, BalancedSampling):
        if any(weight != 1 for weight in weights):
            raise UsageError(
                "data.train: the weights of sets mean nothing where data.order is balanced: leave them out"
            )
        if section.identities * section.images != global_batch:
            raise UsageError(
                f"data.order: {section.identities} identities × {section.images} images are "
                f"{section.identities * section.images}, the global batch (data.batch_size × ranks) is {global_batch}: "
                "they must be equal"
            )
        return BalancedOrder(groups_of(dataset), seed, identities=section.identities, images=section.images)
    orders: list[Order] = []
    for place, part in enumerate(sets):
        own = seed_of_set(seed, place)
        if isinstance(section, BlockSampling):
            orders.append(BlockOrder(len(part), own, block_size=section.block_size, window=section.window))
        else:
            orders.append(SampleOrder(len(part), own))
    return orders[0] if len(orders) == 1 and weights == [1] else MixedOrder(orders, weights)


def build_loader(
    config: Config, dataset: RecordDataset | JointDataset, world: World, *, image_size: tuple[int, int], position: int
) -> TrainLoader:
    """This rank's loader, from ``position`` on."""
    section = config.data
    return TrainLoader(
        dataset,
        batch_size=section.batch_size,
        image_size=image_size,
        rank=world.rank,
        world_size=world.size,
        seed=config.run.seed,
        order=build_order(config, dataset, section.batch_size * world.size),
        drop=section.remainder == "drop",
        flip=section.flip,
        augment=section.augment,
        max_damaged=section.max_damaged,
        device=world.device,
        decode=section.decode,
        threads=decoding_threads(config),
        position=position,
    )
