"""What may change between a checkpoint and the run that goes on from it; docs/checkpoints.md tells it to people."""

from pathlib import Path
from typing import Any

from ...data.errors import UsageError
from ..config import Config
from ..config.errors import shown

FIXED = {
    "backbone.name": "its weights belong to that network",
    "backbone.embedding_dim": "weights and centers have that length",
    "backbone.options": "its weights belong to that network",
    "optimizer.backbone.name": "its state belongs to that optimizer",
    "optimizer.head.name": "its state belongs to that optimizer",
    "run.seed": "the position in the order of samples, and the samples of classes, belong to that seed",
}
"""Keys that must be as they were, with the reason. Everything else may change, and is told where it does."""

_WITHOUT_MEANING = ("run.name", "run.dir", "init", "checkpoint.check_labels")
_WHOLE = ("backbone.options", "data.order", "head.objective")


def changes(before: Config, now: Config, checkpoint: Path, *, begun: bool) -> list[str]:
    """The keys that changed, one line each.

    Args:
        before: the checkpoint's configuration, complete.
        now: this run's.
        checkpoint: for the message.
        begun: whether samples were drawn already; a converted checkpoint begins its order anew.

    Raises:
        UsageError: a key of ``FIXED`` changed.
    """
    old, new = _flat(before.model_dump()), _flat(now.model_dump())
    told = []
    for key in dict.fromkeys([*old, *new]):
        was, is_now = old.get(key), new.get(key)
        if was == is_now or key in _WITHOUT_MEANING or key.startswith("init."):
            continue
        if key in FIXED and (key != "run.seed" or begun):
            raise UsageError(
                f"{checkpoint} cannot go on with {key} {shown(is_now)}: it was {shown(was)} ({FIXED[key]}); put it "
                "back, or begin another run, with init.path if it shall start from these weights"
            )
        told.append(f"changed    {key}: {shown(was)} → {shown(is_now)}")
    return told


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys to values; what only means something as a whole stays one."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and key not in _WHOLE:
            flat |= _flat(value, f"{key}.")
        else:
            flat[key] = value
    return flat
