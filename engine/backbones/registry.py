"""Which backbone a name means: a registered one, one of timm, a function of one's own, one of another package."""

import difflib
import inspect
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError, validate_call
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError
from torch import nn

from ...data.errors import UsageError
from .. import own_code

Factory = TypeVar("Factory", bound=Callable[..., nn.Module])

GROUP = "pfc.backbones"
"""The entry points by which an installed package offers backbones: name = module:function."""

_GIVEN = ("embedding_dim", "image_size")
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
    """All registered names, in the order of their registration, and those of installed packages."""
    return list(dict.fromkeys([*_factories, *(point.name for point in entry_points(group=GROUP))]))


def build_backbone(
    name: str,
    *,
    embedding_dim: int,
    image_size: tuple[int, int],
    folder: str | Path | None = None,
    apart_from: Path | None = None,
    **options: Any,
) -> nn.Module:
    """A new network with random weights (torch's default generator).

    The network maps images [b, 3, H, W], float32 RGB in [-1, 1], to embeddings [b, embedding_dim], float32 also under
    autocast and not normalised.

    Args:
        name: one of ``backbone_names()``; ``timm/NAME``, a model of timm; or ``MODULE:FUNCTION``, a function as
            ``register`` takes it.
        embedding_dim: length D of an embedding.
        image_size: (height, width) in pixels of the images that it will be given.
        folder, apart_from: where MODULE may be, and must not be, see ``own_code.load``.
        options: the named backbone's own options.

    Raises:
        UsageError: unknown name or option, a value that the option does not allow, or too small an image.
    """
    if name.startswith("timm/"):
        from . import from_timm

        return from_timm.build(name, embedding_dim=embedding_dim, image_size=image_size, **options)
    factory = (
        own_code.load("backbone.name", name, folder=folder, apart_from=apart_from) if ":" in name else _by_name(name)
    )
    try:
        parameters = inspect.signature(factory).parameters
    except (ValueError, TypeError):  # no function, or one that is written in C
        parameters = {}
    if any(given not in parameters for given in _GIVEN):
        raise UsageError(
            f"backbone.name: {name} is no backbone: it must be a function of embedding_dim and image_size, and of "
            "options (docs/backbones.md)"
        )
    allowed = [option for option in parameters if option not in _GIVEN]
    open_ended = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    for option in options:
        if option not in allowed and not open_ended:
            known = f"its options are: {', '.join(allowed)}" if allowed else "it has no options"
            raise UsageError(f"backbone.options.{option}: backbone {name!r} has no such option; {known}")
    try:
        network = validate_call(factory)(embedding_dim=embedding_dim, image_size=image_size, **options)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        section = "backbone.options" if where in options else "backbone"
        raise UsageError(f"{section}.{where}: found {first['input']!r}; {first['msg']}") from None
    except (PydanticUserError, PydanticSchemaGenerationError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"backbone.name: {name}: options are numbers, strings, lists, and annotated as such: {reason}"
        ) from None
    if not isinstance(network, nn.Module):
        raise UsageError(f"backbone.name: {name} gives a {type(network).__name__}, not a torch.nn.Module")
    return network


def _by_name(name: str) -> Callable[..., nn.Module]:
    if name in _factories:
        return _factories[name]
    for point in entry_points(group=GROUP, name=name):
        try:
            return point.load()
        except (ImportError, AttributeError) as error:
            raise UsageError(f"backbone.name: {name} of an installed package ({point.value}): {error}") from error
    known = backbone_names()
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? Known: " if near else "known: "
    raise UsageError(
        f"backbone.name: no backbone {name!r}; {hint}{', '.join(known)}, timm/NAME, or MODULE:FUNCTION of your own"
    )
