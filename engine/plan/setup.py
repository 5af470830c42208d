"""What decides the memory and the time of a head: a configuration's settings, with the number of ranks."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ...data.errors import UsageError
from ...partial_fc.kernels.gram import pays
from ...partial_fc.kernels.probabilities import MAX_SCALE
from ...partial_fc.objectives import LogSumExpObjective, Objective, SoftplusObjective
from ...partial_fc.objectives.base import values_of
from ...partial_fc.sampling import expected_rows
from ...partial_fc.storage import aligned
from .. import build, training_data
from ..config import Config
from .machine import Machine

Precision = Literal["float32", "tf32", "bf16"]
ITEM = {"float32": 4, "tf32": 4, "bf16": 2}


@dataclass(frozen=True)
class Setup:
    """A head and its ranks.

    Attributes:
        classes, dim: C and D.
        batch: b, samples of a rank in a micro-batch; accumulate: micro-batches in a step.
        ranks: W.
        rate, batch_rate: share of the classes, and share of the batch that meets them.
        storage, center_dtype: as in the configuration's section ``head``.
        state: name → numbers that the row optimizer keeps beside each center. Single ones are float32, others are
            stored as the centers are.
        products: of the matrix products.
        keep: bytes that probabilities may take; None for the device's default.
        payload: bytes of a number of an embedding, and of a gradient, between the ranks.
        reduction: how the negatives become one number a sample: exponentials block by block, all cosines at once, or
            the Gram matrix.
        sub_centers: S, rows of a class.
        numbers: sums over the ranks that a sample needs.
        nearest: negatives of each sample that are looked for before; 0 for none.
        early: whether the samples' z_y are summed before the negatives are looked at.
    """

    classes: int
    dim: int
    batch: int
    ranks: int
    rate: float = 1.0
    batch_rate: float = 1.0
    accumulate: int = 1
    storage: Literal["device", "host", "file"] = "device"
    center_dtype: Literal["float32", "bf16"] = "float32"
    state: Mapping[str, int] = field(default_factory=dict)
    products: Precision = "float32"
    keep: int | None = None
    payload: tuple[int, int] = (4, 4)
    reduction: Literal["blocks", "cosines", "gram"] = "blocks"
    sub_centers: int = 1
    numbers: int = 2
    nearest: int = 0
    early: bool = False

    @classmethod
    def of(cls, config: Config, ranks: int) -> "Setup":
        """That of a run.

        Raises:
            UsageError: the number of identities is not known.
        """
        head, dim = config.head, config.backbone.embedding_dim
        if head.num_classes is None:
            raise UsageError("how many identities? Give --classes N or head.num_classes, or the data set's folder")
        payload = ITEM[head.payload_dtype] if head.payload_dtype else 4
        plain = cls(
            classes=head.num_classes,
            dim=dim,
            batch=config.data.batch_size,
            ranks=ranks,
            rate=head.sample_rate,
            batch_rate=head.batch_rate,
            accumulate=config.optimizer.accumulate,
            storage=head.storage,
            center_dtype=head.center_dtype,
            state=build.row_state_of(config),
            products=build.products_name(config),
            keep=None if head.keep_mib is None else head.keep_mib << 20,
            payload=(payload, payload),
            sub_centers=head.sub_centers,
            numbers=2 if head.class_weights is None else 3,
        )
        return plain.with_reduction(head.objective.build())

    def with_reduction(self, objective: Objective) -> "Setup":
        if isinstance(objective, LogSumExpObjective):
            nearest = objective.top_k + 1 if objective.hard_by == "largest" else 0
            by_blocks = max(values_of(objective.scale)) <= MAX_SCALE
            early = objective.hard_by == "target"
            return replace(self, reduction="blocks" if by_blocks else "cosines", nearest=nearest, early=early)
        if isinstance(objective, SoftplusObjective):
            return replace(self, numbers=self.numbers + 1)
        gram = getattr(objective, "gram", None)
        by_gram = self.sub_centers == 1
        by_gram &= pays(self.global_batch, self.dim, int(self.rows)) if gram is None else gram
        return replace(self, reduction="gram" if by_gram else "cosines")

    @property
    def global_batch(self) -> int:
        """B."""
        return self.batch * self.ranks

    @property
    def shard(self) -> int:
        """n, the rows that a rank stores, at most."""
        return -(-self.classes // self.ranks) * self.sub_centers

    @property
    def rows(self) -> float:
        """K, the rows that a micro-batch uses on a rank."""
        return expected_rows(self.classes, self.ranks, self.rate, self.global_batch) * self.sub_centers

    @property
    def stepped_rows(self) -> float:
        """The rows that a step changes: those of all its micro-batches, each once."""
        return self.shard * (1 - (1 - self.rows / self.shard) ** self.accumulate)

    @property
    def center_bytes(self) -> int:
        """Of one center."""
        return self.dim * ITEM[self.center_dtype]

    @property
    def wide_state_bytes(self) -> int:
        """Of one row's state that is as wide as the center."""
        return sum(width for width in self.state.values() if width > 1) * ITEM[self.center_dtype]

    @property
    def state_bytes(self) -> int:
        """Of all state of one row."""
        return self.wide_state_bytes + 4 * sum(width == 1 for width in self.state.values())

    @property
    def row_bytes(self) -> int:
        """Of one center with its state, as it is stored."""
        together = self.center_bytes + self.wide_state_bytes
        if self.storage != "device":
            together = aligned(together)
        return together + self.state_bytes - self.wide_state_bytes

    @property
    def staged(self) -> bool:
        """Whether a step works on copies of its rows: those that it uses of centers outside the device."""
        return self.storage != "device" and self.rate < 1

    def fused(self, machine: Machine) -> bool:
        """Whether the fused kernels make the step; elsewhere on a GPU torch's own operations do."""
        on_device = self.storage == "device" or self.staged
        return (
            machine.gpu
            and machine.fused
            and on_device
            and self.center_dtype == "float32"
            and self.reduction == "blocks"
            and self.sub_centers == 1
        )

    def operand(self, machine: Machine) -> int:
        """Bytes of a number of the products' operands. A CPU's stay float32."""
        return ITEM[self.products] if machine.gpu else 4

    def kept_passes(self, machine: Machine) -> int:
        """How many micro-batches keep their probabilities until the row update; the others recompute them."""
        if self.reduction != "blocks":
            return 0
        default = int(machine.memory) // 16 if machine.gpu else 1 << 30
        limit = default if self.keep is None else self.keep
        return int(min(self.accumulate, limit // max(1, self.probability_bytes(machine))))

    def probability_bytes(self, machine: Machine) -> int:
        """Of the probabilities of one micro-batch."""
        return int(self.batch_rate * self.global_batch * self.rows) * self.operand(machine)


def completed(config: Config, classes: int | None) -> tuple[Config, list[str]]:
    """The configuration with the number of identities and the images' size filled in, from what is there; and what was
    assumed, in words. Neither the data set nor anything else has to be on this machine.
    """
    section, assumed = config.data, []
    classes = classes or config.head.num_classes
    size = section.image_size
    if classes is None or size is None:
        try:
            dataset = training_data.open_dataset(config)
        except (UsageError, OSError):
            dataset = None
        if dataset is not None:
            classes, size = classes or dataset.num_classes, size or list(dataset.image_size or ()) or None
    if size is None:
        size = [112, 112]
        assumed.append("images of 112×112 (data.image_size)")
    return config.model_copy(
        update={
            "data": section.model_copy(update={"image_size": size}),
            "head": config.head.model_copy(update={"num_classes": classes}),
        }
    ), assumed
