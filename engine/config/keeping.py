"""What a run measures, writes down and keeps."""

from typing import Annotated, Literal

from pydantic import Field

from .section import Count, Positive, Section


class Evaluation(Section):
    every_steps: Count = 500
    """Steps between evaluations; the first step and the last are always evaluated."""
    pairs: list[str] = []
    """Verification sets (.bin)."""
    batch_size: Count = 128
    """Images per rank in one forward pass."""
    flip: bool = True
    """Add the mirror image's embedding; both accuracies are reported, this one leads."""


class BestCheckpoint(Section):
    """The checkpoint that stays because it measured best."""

    metric: Annotated[str, Field(pattern=r"^(accuracy|accuracy_flip|accuracy_noflip|auc|eer|tar_at_far_1e-\d)$")] = (
        "accuracy"
    )
    """A field of evaluation.jsonl."""
    set: str | None = None
    """The verification set, by its file's name without .bin; the first of evaluation.pairs when absent."""
    mode: Literal["max", "min"] | None = None
    """Which is best, the largest or the smallest; the smallest eer and the largest of the others when absent."""


class Checkpoint(Section):
    every_steps: Count = 500
    """Steps between checkpoints; the last step is always saved."""
    every_minutes: Positive | None = None
    """Minutes between checkpoints, by the first rank's clock, besides those of every_steps."""
    keep: Count = 3
    """How many of the latest stay."""
    best: BestCheckpoint | None = None
    """Keep the best one too, saved as soon as it is measured."""
    asynchronous: bool = False
    """Copy the state into host memory and write it beside training."""
    check_labels: bool = True
    """Refuse to go on with the centers of other identities than the data set's, where both are known by name."""


class Log(Section):
    every_steps: Count = 20
    """Steps between lines of metrics.jsonl and of the progress."""
    tensorboard: bool = True
    """Write TensorBoard's files as well."""
