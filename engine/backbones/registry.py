"""The register of backbones by name."""

import difflib
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from pydantic import ValidationError, validate_call
from torch import nn

from ...data.errors import UsageError

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])

_factories: dict[str, Callable[..., nn.Module]] = {}


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator: makes a function known as the backbone ``name``.

    The function takes ``embedding_dim: int``, ``image_size: tuple[int, int]`` (height, width) and, after them, its own
    options with defaults. The options' annotations are enforced (``Literal``, ``Annotated[int, Field(ge=1)]``, ...).
    """

    def add(factory: Factory) -> Factory:
        if name in _factories:
            raise ValueError(f"two backbones are registered as {name!r}")
        _factories[name] = factory
        return factory

    return add


def backbone_names() -> list[str]:
    """All registered names, in the order of their registration."""
    return list(_factories)


def build_backbone(name: str, *, embedding_dim: int, image_size: tuple[int, int], **options: Any) -> nn.Module:
    """A new network with random weights (torch's default generator).

    The network maps images [b, 3, H, W], float32 RGB in [-1, 1], to embeddings [b, embedding_dim], float32 also under
    autocast and not normalised.

    Args:
        name: one of ``backbone_names()``.
        embedding_dim: length D of an embedding.
        image_size: (height, width) in pixels of the images that it will be given.
        options: the named backbone's own options.

    Raises:
        UsageError: unknown name or option, a value that the option does not allow, or too small an image.
    """
    if name not in _factories:
        near = difflib.get_close_matches(name, _factories, n=1)
        hint = f"did you mean {near[0]!r}? Known: " if near else "known: "
        raise UsageError(f"backbone.name: no backbone {name!r}; {hint}{', '.join(backbone_names())}")
    factory = _factories[name]
    allowed = [
        option for option in inspect.signature(factory).parameters if option not in ("embedding_dim", "image_size")
    ]
    for option in options:
        if option not in allowed:
            known = f"its options are: {', '.join(allowed)}" if allowed else "it has no options"
            raise UsageError(f"backbone.options.{option}: backbone {name!r} has no such option; {known}")
    try:
        return validate_call(factory)(embedding_dim=embedding_dim, image_size=image_size, **options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        section = "backbone.options" if where in options else "backbone"
        raise UsageError(f"{section}.{where}: found {first['input']!r}; {first['msg']}") from None
