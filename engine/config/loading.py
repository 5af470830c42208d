"""From a file, and what the command line puts in its place, to a configuration."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ...data.errors import UsageError
from .errors import explain, shown
from .run import Config


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies ``key.sub=value`` overrides (values are YAML), and validates.

    Raises:
        UsageError: one line with the path of the key, what was found and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such configuration file")
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected sections such as data: and schedule:, found {shown(tree)}")
    for override in overrides or []:
        _apply(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], *, source: str = "configuration") -> Config:
    """Validates a tree of plain values; see ``load_config``."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first, *rest = [explain(detail, Config) for detail in error.errors()]
        more = f" (and {len(rest)} more)" if rest else ""
        raise UsageError(f"{source}: {first}{more}") from None


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and everybody does; PyYAML's own rule wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UsageError(f"override {override!r}: write it as key.sub=value, for example optimizer.backbone.lr=0.05")
    for name in names[:-1]:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise UsageError(f"override {override!r}: {name} is a value, not a section")
    try:
        tree[names[-1]] = _parse(value)
    except yaml.YAMLError as error:
        raise UsageError(f"override {override!r}: not valid YAML: {' '.join(str(error).split())}") from None
