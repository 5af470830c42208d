"""From a file, and what the command line puts in its place, to a configuration; what is wrong with it in one line."""

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import BaseModel, Tag, ValidationError

from ...data.errors import UsageError
from .sections import Config


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies ``key.sub=value`` overrides (values are YAML), and validates.

    Raises:
        UsageError: one line with the path of the key, what was found and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such configuration file")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected sections such as data: and schedule:, found {shown(tree)}")
    for override in overrides or []:
        _apply(tree, override)
    config = parse_config(tree, source=str(path))
    if config.run.code is None and any(":" in name for name in config.names_of_code):
        config = config.model_copy(update={"run": config.run.model_copy(update={"code": str(path.absolute().parent)})})
    return config


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


def parse_yaml(text: str) -> Any:
    """As a configuration is read: 1e-3 is a number."""
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
        tree[names[-1]] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise UsageError(f"override {override!r}: not valid YAML: {' '.join(str(error).split())}") from None


def flat(tree: Mapping[str, Any], prefix: str = "", whole: Collection[str] = ()) -> dict[str, Any]:
    """A configuration as dotted keys: ``{"head.objective.name": "arcface", ...}``.

    Args:
        whole: dotted keys whose value stays one, because it means something as a whole only.
    """
    found: dict[str, Any] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value and key not in whole:
            found |= flat(value, f"{key}.", whole)
        else:
            found[key] = value
    return found


def explain(detail: Any, root: type[BaseModel]) -> str:
    """One of ``ValidationError.errors()``, found while validating ``root``."""
    location, model = _locate(detail["loc"], root)
    key, found = ".".join(location) or "configuration", shown(detail["input"])
    match detail["type"]:
        case "extra_forbidden":
            allowed = list(model.model_fields)
            close = difflib.get_close_matches(location[-1], allowed, n=1)
            hint = f"did you mean {close[0]}? " if close else ""
            return f"{key}: unknown key; {hint}allowed here: {', '.join(allowed)}"
        case "missing":
            return f"{key}: missing; it has to be given"
        case "value_error":
            return f"{key}: {detail['ctx']['error']}"
        case "union_tag_invalid":
            tags = [tag.strip(" '") for tag in detail["ctx"]["expected_tags"].split(",")]
            allowed = [tag for tag in tags if tag.startswith("row_") == (location[-1] == "head")]
            return f"{key}.name: found {detail['ctx']['tag']!r}, allowed: {', '.join(allowed)}"
        case "string_pattern_mismatch":
            return f"{key}: found {found}, allowed: letters, digits, '.', '_' and '-'"
        case "model_type" | "model_attributes_type" | "dict_type":
            return f"{key}: found {found}, allowed: a section of its own, indented below"
        case _:
            allowed = detail["msg"].removeprefix("Input should be ").removeprefix("a valid ")
            return f"{key}: found {found}, allowed: {allowed}"


def _locate(location: tuple[int | str, ...], root: type[BaseModel]) -> tuple[list[str], Any]:
    """The key's path without pydantic's tags of union members, and the section in which its last part was looked up."""
    path, model, members = [], None, {}
    current: Any = root
    for part in location:
        if part in members:
            current, members = members[part], {}
            continue
        path.append(str(part))
        if isinstance(part, int):  # a place in a list
            current = _plain(get_args(current)[0])
            continue
        model = current
        field = getattr(current, "model_fields", {}).get(part)
        current = _given(field.annotation) if field else None
        members = {tag: _plain(kind) for kind in get_args(current) for tag in _tags(kind)}
    return path, model


def _tags(kind: Any) -> list[str]:
    """What pydantic calls a member of a union: the values of its ``name``, or its own tag."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(get_args(kind.model_fields["name"].annotation)) if "name" in kind.model_fields else []
    return [extra.tag for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, Tag)]


def _given(kind: Any) -> Any:
    """Of what may be nothing, what it is else."""
    others = [one for one in get_args(kind) if one is not NoneType]
    return others[0] if len(others) == 1 and NoneType in get_args(kind) else kind


def _plain(kind: Any) -> Any:
    """The type without what ``Annotated`` says about it."""
    return kind.__origin__ if hasattr(kind, "__metadata__") else kind


def shown(value: Any) -> str:
    """The value, shortened."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
