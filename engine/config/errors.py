"""What is wrong with a configuration, in one line: the key's path, what was found and what is allowed."""

import difflib
from typing import Any, get_args

from pydantic import BaseModel, Tag


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
        current = field.annotation if field else None
        members = {tag: _plain(kind) for kind in get_args(current) for tag in _tags(kind)}
    return path, model


def _tags(kind: Any) -> list[str]:
    """What pydantic calls a member of a union: the values of its ``name``, or its own tag."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return list(get_args(kind.model_fields["name"].annotation))
    return [extra.tag for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, Tag)]


def _plain(kind: Any) -> Any:
    """The type without what ``Annotated`` says about it."""
    return kind.__origin__ if hasattr(kind, "__metadata__") else kind


def shown(value: Any) -> str:
    """The value, shortened."""
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
