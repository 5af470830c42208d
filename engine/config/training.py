"""How it is trained: the optimizers, their schedule, and what is done about losses that jump."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from .section import Count, CountOrZero, Fraction, NonNegative, Positive, Section


class SGD(Section):
    """Of the backbone (``sgd``, torch.optim.SGD) or of the centers (``row_sgd``, pfc.partial_fc.RowSGD)."""

    name: Literal["sgd", "row_sgd"]
    lr: Positive = 0.1
    """Peak learning rate."""
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 5e-4
    nesterov: bool = False

    @model_validator(mode="after")
    def _nesterov(self) -> "SGD":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")
        return self


class AdamW(Section):
    """Of the backbone (``adamw``) or of the centers (``row_adamw``)."""

    name: Literal["adamw", "row_adamw"]
    lr: Positive = 1e-3
    """Peak learning rate."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Positive = 1e-8
    weight_decay: NonNegative = 1e-2


class Adagrad(Section):
    """Of the centers: one number of state a row (pfc.partial_fc.RowAdagrad)."""

    name: Literal["row_adagrad"]
    lr: Positive = 1e-2
    """Peak learning rate."""
    eps: Positive = 1e-10
    weight_decay: NonNegative = 0.0


class Optimizer(Section):
    backbone: Annotated[SGD | AdamW, Field(discriminator="name")] = SGD(name="sgd")
    head: Annotated[SGD | AdamW | Adagrad, Field(discriminator="name")] = SGD(name="row_sgd")
    accumulate: Count = 1
    """Micro-batches per step; their gradients are averaged."""
    clip_norm: Positive | None = None
    """Largest norm of the backbone's gradient; no clipping when absent."""
    max_skipped_in_a_row: Count = 20
    """Steps in a row that may be skipped because the loss or a gradient is not finite; then the run ends with a
    diagnosis. In fp16 16 more, as many as the search for the loss's scale can take."""

    @model_validator(mode="before")
    @classmethod
    def _default_names(cls, tree: Any) -> Any:
        """optimizer.backbone.lr=0.05 alone means SGD's."""
        if isinstance(tree, dict):
            for part, name in (("backbone", "sgd"), ("head", "row_sgd")):
                if isinstance(tree.get(part), dict):
                    tree = {**tree, part: {"name": name, **tree[part]}}
        return tree

    @model_validator(mode="after")
    def _each_its_own(self) -> "Optimizer":
        if self.backbone.name.startswith("row_"):
            raise ValueError(f"backbone.name is {self.backbone.name!r}, allowed: sgd, adamw")
        if not self.head.name.startswith("row_"):
            raise ValueError(f"head.name is {self.head.name!r}, allowed: row_sgd, row_adamw, row_adagrad")
        return self


class Schedule(Section):
    steps: Count | None = None
    """Number of optimizer steps."""
    epochs: Positive | None = None
    """Number of passes over the data set; exactly one of steps and epochs is given."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up; the first one runs at lr / warmup_steps."""
    name: Literal["polynomial", "cosine", "constant"] = "polynomial"
    """How the learning rate falls after the warm-up."""
    power: Positive = 2.0
    """Exponent of the polynomial."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the peak learning rate that is left at the end."""

    @model_validator(mode="after")
    def _one_length(self) -> "Schedule":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is more than steps ({self.steps})")
        return self


class Spike(Section):
    """What to do about a loss far above those before it."""

    factor: Annotated[float, Field(gt=1)] = 3.0
    """How many times the median of the last losses a spike is."""
    window: Annotated[int, Field(ge=2)] = 100
    """How many these are; nothing is a spike before there are so many."""
    rollback: bool = True
    """Go back to the last checkpoint, and on with the data that follow the spike; else it is only told."""
    max_rollbacks: Count = 3
    """So many in a run; at one more spike it ends."""
