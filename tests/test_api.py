"""docs/api.md lists what other people's code may use: a name, a signature or a key does not change by accident.

python -m tests.test_api        # after a change that is meant: writes the page anew
"""

import ast
import difflib
import importlib
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from pfc.engine.config import parse_config

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "api.md"
START = """\
# The public interface

What other Python code may import, and the keys of a configuration. What this page names changes only with a line in the
[changes](../CHANGELOG.md); what it does not name may change at any time. Arguments, shapes and what is raised are in
the docstrings. The page is written from the code by `python -m tests.test_api`, and a test compares the two.
"""


def test_the_page_is_what_the_code_has() -> None:
    lines = difflib.unified_diff(PAGE.read_text(encoding="utf-8").splitlines(), page().splitlines(), "page", "code")
    difference = "\n".join(lines)
    assert not difference, (
        f"docs/api.md is not what the code has. If the change is meant: python -m tests.test_api\n{difference}"
    )


def page() -> str:
    things = [(module, name, getattr(module, name)) for module in modules() for name in names(module)]
    stubs = formatted([stub(name, thing) for _, name, thing in things])
    parts = [START]
    before = None
    for (module, name, _), text in zip(things, stubs, strict=True):
        if module is not before:
            parts.append(f"## {module.__name__}\n\n{first_sentence(inspect.getdoc(module) or '')}\n")
        parts.append(f"### {name}\n\n```python\n{text}\n```\n")
        before = module
    parts.append(f"## Keys of a configuration\n\nWith their defaults.\n\n```yaml\n{keys()}```\n")
    return "\n".join(parts)


def modules() -> Iterator[ModuleType]:
    """Those that say what is public in them."""
    for folder in ("partial_fc", "data", "engine"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            if re.search("^__all__ = ", path.read_text(encoding="utf-8"), re.MULTILINE):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
                yield importlib.import_module(f"pfc.{name}")


def names(module: ModuleType) -> list[str]:
    return [name for name in sorted(module.__all__, key=str.lower) if not inspect.ismodule(getattr(module, name))]


def stub(name: str, thing: Any) -> str:
    """Its declaration, with the first sentence of each docstring."""
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return f"{name} = {thing!r}"
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    return ast.unparse(declared(node))


def formatted(stubs: list[str]) -> list[str]:
    command = [Path(sys.executable).with_name("ruff"), "format", "--isolated", "--line-length=100"]
    together = "\n# next\n".join(stubs)
    done = subprocess.run([*command, "--stdin-filename=api.pyi", "-"], input=together, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [text.strip() for text in done.stdout.split("# next\n")]


def declared(node: Any) -> Any:
    """The same without bodies and without what is private."""
    if isinstance(node, ast.AnnAssign):
        return node
    told = ast.get_docstring(node)
    node.body = [] if isinstance(node, ast.FunctionDef) else [declared(kept) for kept in node.body if public(kept)]
    if told:
        node.body.insert(0, ast.Expr(ast.Constant(first_sentence(told))))
    elif not node.body:
        node.body = [ast.Expr(ast.Constant(...))]
    return node


def public(node: ast.stmt) -> bool:
    if isinstance(node, ast.FunctionDef):
        return not node.name.startswith("_") or (node.name.endswith("__") and node.name != "__post_init__")
    target = node.target if isinstance(node, ast.AnnAssign) else None
    return isinstance(target, ast.Name) and not target.id.startswith("_")


def first_sentence(text: str) -> str:
    return re.split(r"(?<=\.) (?=[A-Z`])", " ".join(text.split("\n\n")[0].split()))[0]


def keys() -> str:
    """Every key with its default."""
    config = parse_config({"data": {"train": "PATH"}, "schedule": {"steps": 1}})
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
