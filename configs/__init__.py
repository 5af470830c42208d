"""Configurations to begin with. ``recipes/`` has one for each usual task; ``pfc new recipe`` copies them."""

from pathlib import Path


def recipes() -> dict[str, Path]:
    """Name → file."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}


def about(recipe: Path) -> str:
    """What a recipe is for: its first line."""
    return recipe.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
