"""What a run reads: its training set, the order of the samples, its loader, the weights of its identities."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import GeneratedDataset, GeneratedLoader, JointDataset, Loader, RecordDataset, TrainLoader
from ..data.errors import UsageError
from ..data.loading.readahead import need_room
from ..data.order.balanced import BalancedOrder, groups_of
from ..data.order.mixed import MixedOrder, PartedOrder, seed_of_set
from ..data.order.orders import BlockOrder, Order, SampleOrder
from ..data.remote.mirror import RemoteOptions
from .config import BalancedSampling, BlockSampling, Config, Generated
from .ranks.affinity import cores_of_rank
from .ranks.distributed import World

Dataset = RecordDataset | JointDataset | GeneratedDataset
"""What a run trains on."""


def read_class_weights(config: Config, dataset: Dataset) -> Tensor | None:
    """What ``head.class_weights`` says, float32 [C]; None for none.

    Raises:
        UsageError: the file is not there, or does not fit the data set.
    """
    section, classes = config.head.class_weights, dataset.num_classes
    if section is None:
        return None
    if section.file is not None:
        try:
            weights = np.load(section.file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise UsageError(f"head.class_weights.file: {section.file}: {reason}; give a .npy file") from None
        if not isinstance(weights, np.ndarray) or weights.shape != (classes,) or weights.dtype.kind not in "fiu":
            found = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, np.ndarray) else "several arrays"
            raise UsageError(f"head.class_weights.file: {section.file} must hold {classes} numbers, found {found}")
        if not (np.isfinite(weights) & (weights >= 0)).all():
            raise UsageError(f"head.class_weights.file: {section.file}: weights must be finite and not negative")
        return torch.from_numpy(weights.astype(np.float32))
    assert section.frequency is not None
    if isinstance(dataset, GeneratedDataset):  # as many images of each
        return torch.ones(classes)
    labels = dataset.labels(damaged=-1)
    counts = np.bincount(labels[labels >= 0], minlength=classes).astype(np.float64)
    weights = np.where(counts > 0, np.maximum(counts, 1) ** -section.frequency, 0.0)
    return torch.from_numpy((weights * counts.sum() / (weights * counts).sum()).astype(np.float32))


_MOST_THREADS = 8  # by default: tens of thousands of images of 112×112 a second


def decoding_threads(config: Config) -> int:
    """How many threads this rank decodes with."""
    return config.data.threads or min(_MOST_THREADS, cores_of_rank())


def remote_options(config: Config) -> RemoteOptions:
    """How remote training sets are read."""
    return RemoteOptions(**config.data.cache.model_dump())


def open_dataset(config: Config) -> Dataset:
    """The training set, or all of them joined."""
    train = config.data.train
    if isinstance(train, Generated):
        return GeneratedDataset(
            train.generated,
            images_per_identity=train.images_per_identity,
            image_size=(train.image_size[0], train.image_size[1]),
            active=train.active,
            seed=train.seed,
        )
    return JointDataset.open([source.path for source in config.data.sources], remote=remote_options(config))


def build_order(config: Config, dataset: Dataset, global_batch: int) -> Order:
    """The order of samples."""
    section, seed = config.data.order, config.run.seed
    sets = dataset.sets if isinstance(dataset, JointDataset) else [dataset]
    weights = [source.weight for source in config.data.sources] or [1.0]
    if isinstance(section, BalancedSampling):
        assert not isinstance(dataset, GeneratedDataset)  # which the configuration refuses
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
        need_room(dataset, [])  # before all labels are read for it
        return BalancedOrder(groups_of(dataset), seed, identities=section.identities, images=section.images)
    if isinstance(section, BlockSampling) and section.parts > 1:
        return _parted(section, config, dataset, global_batch, weights)
    orders: list[Order] = []
    for place, part in enumerate(sets):
        own = seed_of_set(seed, place)
        if isinstance(section, BlockSampling):
            orders.append(BlockOrder(len(part), own, block_size=section.block_size, window=section.window))
        else:
            orders.append(SampleOrder(len(part), own))
    return orders[0] if len(orders) == 1 and weights == [1] else MixedOrder(orders, weights)


def _parted(section: BlockSampling, config: Config, dataset: Dataset, global_batch: int, weights: list[float]) -> Order:
    """The order of ``data.order.parts``."""
    parts, key = section.parts, "data.order.parts"
    if any(weight != 1 for weight in weights):
        raise UsageError(f"{key}: sets with weights cannot be read in parts: leave out the weights, or the parts")
    if global_batch % parts:
        raise UsageError(f"{key}: {parts} do not divide the global batch, {global_batch} images: choose another number")
    if config.data.remainder == "drop":
        raise UsageError(f"{key}: in parts nothing is left over at the end of an epoch: data.remainder must be carry")
    if len(dataset) < parts:
        raise UsageError(f"{key}: {parts} parts of {len(dataset)} images: choose a smaller number")
    ends = [len(dataset) * (part + 1) // parts for part in range(parts)]
    window = max(section.block_size, section.window // parts)
    return PartedOrder(
        [
            BlockOrder(
                end - start,
                seed_of_set(config.run.seed, part),
                block_size=section.block_size,
                window=window,
            )
            for part, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
        ],
        global_batch,
    )


def build_loader(
    config: Config, dataset: Dataset, world: World, *, image_size: tuple[int, int], position: int
) -> Loader:
    """This rank's loader, from ``position`` on."""
    section = config.data
    common: dict[str, Any] = {
        "batch_size": section.batch_size,
        "rank": world.rank,
        "world_size": world.size,
        "seed": config.run.seed,
        "order": build_order(config, dataset, section.batch_size * world.size),
        "drop": section.remainder == "drop",
        "flip": section.flip,
        "device": world.device,
        "position": position,
    }
    if isinstance(dataset, GeneratedDataset):
        return GeneratedLoader(dataset, **common)
    return TrainLoader(
        dataset,
        **common,
        image_size=image_size,
        augment=section.augment,
        max_damaged=section.max_damaged,
        decode=section.decode,
        threads=decoding_threads(config),
    )
