"""Where a run may be logged besides its own files: one file each, imported when it is named."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

from ....data.errors import UsageError
from ...config import Config
from ...own_code import load
from ..hooks import Hook

_OURS = {"tensorboard": "TensorBoard", "wandb": "WandB", "mlflow": "MLflow"}


def open_loggers(config: Config) -> Sequence[Hook]:
    """The hooks that ``log.loggers`` names, not started.

    Raises:
        UsageError: one is not known or not installed, or does not take its options.
    """
    hooks = []
    for place, one in enumerate(config.log.loggers):
        key, name = f"log.loggers[{place}]", one.name
        if name in _OURS:
            kind = getattr(importlib.import_module(f".{name}", __name__), _OURS[name])
        elif ":" in name:
            kind = load(key, name, folder=config.run.code)
        else:
            raise UsageError(f"{key}: found {name!r}; allowed: {', '.join(_OURS)}, or MODULE:CLASS of your own")
        if not (isinstance(kind, type) and issubclass(kind, Hook)):
            raise UsageError(f"{key}: {name} is no subclass of pfc.engine.log.hooks.Hook")
        options: dict[str, Any] = dict(one.model_extra or {})
        try:
            inspect.signature(kind).bind(**options)
        except TypeError as error:
            raise UsageError(f"{key}: {name} does not take {options}: {error}") from None
        try:
            hooks.append(kind(**options))
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"{key}: {name}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    return hooks
