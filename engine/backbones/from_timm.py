"""``timm/NAME``: any model of timm as a backbone. timm is imported when one is asked for."""

import difflib
import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ...data.errors import UsageError

PREFIX = "timm/"
Norm = Literal["batch", "layer", "none"]
_OURS = ("num_classes", "in_chans", "img_size", "pretrained", "checkpoint_path", "scriptable", "exportable")


class TimmBackbone(nn.Module):
    """images [b, 3, H, W] → timm's pooled features → a linear layer and a norm → embeddings [b, embedding_dim]

    Attributes:
        model: timm's, without its classifier.
    """

    def __init__(self, model: nn.Module, image_size: tuple[int, int], embedding_dim: int, norm: Norm) -> None:
        super().__init__()
        self.model = model
        told: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
        # From [-1, 1] to what the model's own weights were trained on: its default weights, if it has any.
        mean = torch.tensor(told.get("mean", (0.5, 0.5, 0.5))).view(3, 1, 1)
        std = torch.tensor(told.get("std", (0.5, 0.5, 0.5))).view(3, 1, 1)
        self.register_buffer("scale", 0.5 / std, persistent=False)
        self.register_buffer("shift", (0.5 - mean) / std, persistent=False)
        self.scale: Tensor
        self.shift: Tensor
        self.fc = nn.Linear(self._features(image_size), embedding_dim, bias=norm == "none")
        self.features = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}[norm](embedding_dim)

    def forward(self, images: Tensor) -> Tensor:
        x = self.model(images * self.scale + self.shift)
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.fc(x.float()))

    def translate(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A file of timm's own weights under the names that they have here; position embeddings are resampled."""
        fit: Callable[..., dict[str, Tensor]] | None = getattr(
            sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None
        )
        if fit is not None:
            weights = fit(weights, self.model)
        return {f"model.{name}": value for name, value in weights.items()}

    def block_numbers(self) -> dict[str, int] | None:
        """In which block each parameter is, as timm groups them; None where this model of timm does not say."""
        from timm.models import group_parameters

        if not hasattr(self.model, "group_matcher"):
            return None
        found: Any = group_parameters(self.model, self.model.group_matcher(), reverse=True)  # type: ignore
        numbers: dict[str, int] = {f"model.{name}": number for name, number in found.items()}
        last = max(numbers.values(), default=0) + 1
        return {name: numbers.get(name, last) for name, _ in self.named_parameters()}

    def _features(self, image_size: tuple[int, int]) -> int:
        """How many numbers the model gives for an image of this size."""
        training = self.model.training
        try:
            with torch.no_grad():
                found = self.model.eval()(torch.zeros(1, 3, *image_size))
        except Exception as error:  # each model has its own way to say so
            reason = " ".join(str(error).split())
            height, width = image_size
            raise UsageError(f"backbone.name: the model cannot take images of {height}×{width}: {reason}") from None
        finally:
            self.model.train(training)
        if not isinstance(found, Tensor) or found.ndim != 2:
            given = list(found.shape) if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise UsageError(
                f"backbone.name: the model gives {given} for an image, not one row of features: set "
                "its pooling, such as options: {global_pool: avg}"
            )
        return found.shape[1]


def build(name: str, *, embedding_dim: int, image_size: tuple[int, int], norm: Norm = "batch", **options: Any) -> Any:
    """The model with random weights; ``options`` go to ``timm.create_model``.

    Raises:
        UsageError: timm is not installed, or does not know the model or an option.
    """
    try:
        import timm
    except ImportError:
        raise UsageError(f"backbone.name: {name} is timm's, which is not installed: pip install 'pfc[timm]'") from None
    model_name = name.removeprefix(PREFIX)
    if not timm.is_model(model_name):
        near = difflib.get_close_matches(model_name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names them"
        raise UsageError(f"backbone.name: timm {timm.__version__} has no model {model_name!r}; {hint}")
    for option in _OURS:
        if option in options:
            advice = (
                "give the file as init.path, with init.partial: true"
                if option in ("pretrained", "checkpoint_path")
                else "it follows from the rest of the configuration"
            )
            raise UsageError(f"backbone.options.{option}: {advice}")
    if norm not in ("batch", "layer", "none"):
        raise UsageError(f"backbone.options.norm: found {norm!r}; allowed: batch, layer, none")
    common = {"pretrained": False, "num_classes": 0, "in_chans": 3, **options}
    try:
        try:
            model = timm.create_model(model_name, img_size=image_size, **common)
        except TypeError as error:  # a convolutional network takes any size
            if "img_size" not in str(error):
                raise
            model = timm.create_model(model_name, **common)
    except Exception as error:  # whatever a model makes of an option that it does not know
        reason = " ".join(str(error).split())
        raise UsageError(f"backbone: timm cannot build {model_name} for {image_size}, {options}: {reason}") from None
    return TimmBackbone(model, image_size, embedding_dim, norm)
