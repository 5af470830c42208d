"""Draws the figures of docs/objectives.md from the objectives themselves.

python docs/plot_objectives.py [FOLDER]        # docs/images when no folder is given
"""

import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from torch import Tensor

from pfc.engine.report.figures import GREY, SET_COLOURS, STYLE
from pfc.partial_fc import objectives
from pfc.partial_fc.objectives import Objective, SquaresObjective

IMAGES = Path(__file__).parent / "images"
SHOWN: dict[str, dict[str, Any]] = {"combined": {"m1": 1.1, "m2": 0.2, "m3": 0.1}}  # its defaults are softmax
TARGETS = (0.0, 0.4, 0.8)
COSINES = (0.25, 0.5, 0.75)  # ℓ = s·cosine is what one negative of that cosine amounts to
SQUARES = (0.0, 1.0, 2.0)
WIDTHS = (3.6, 2.2, 1.2)  # where curves lie on one another, all of them stay visible
POINTS = 241


def main(folder: Path = IMAGES) -> list[Path]:
    """Draws every objective that ``objectives.build`` knows, and all of them together."""
    folder.mkdir(parents=True, exist_ok=True)
    shown = {name: objectives.build(name, **SHOWN.get(name, {})) for name in objectives.names()}
    files = []
    with rc_context(STYLE):
        for name, objective in shown.items():
            files.append(_save(draw_one(name, objective), folder / f"objective-{name}.svg"))
        files.append(_save(draw_together(shown), folder / "objectives-together.svg"))
    return files


def slopes(objective: Objective, target: Tensor, negatives: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, ∂loss/∂target and ∂loss/∂negatives of each sample [B], float64, by autograd."""
    target, negatives = (numbers.double().detach().requires_grad_() for numbers in (target, negatives))
    loss = objective(target, negatives)
    by_target, by_negatives = torch.autograd.grad(loss.sum(), (target, negatives))
    return loss.detach(), by_target, by_negatives


def draw_one(name: str, objective: Objective) -> Figure:
    """Loss and slopes of one objective: against the target at three negatives, and the other way round."""
    scale = _scale(objective)
    if isinstance(objective, SquaresObjective):
        symbol, levels, widest = "q", SQUARES, 4.0
    else:
        symbol, levels, widest = r"\ell", [scale * cosine for cosine in COSINES], scale
    figure = Figure(figsize=(10.5, 2.9), layout=ConstrainedLayoutEngine(wspace=0.05))
    figure.suptitle(_title(name, objective), fontsize=10, x=0.01, ha="left")
    axes: Sequence[Axes] = figure.subplots(1, 4)
    target = torch.linspace(-0.999, 0.999, POINTS)
    for level, colour, width in zip(levels, SET_COLOURS[:3], WIDTHS, strict=True):
        loss, by_target, _ = slopes(objective, target, torch.full_like(target, level))
        axes[0].plot(target, loss, color=colour, linewidth=width, label=f"${symbol} = {level:g}$")
        axes[1].plot(target, -by_target, color=colour, linewidth=width)
    negatives = torch.linspace(0.0, widest, POINTS)
    for place, colour, width in zip(TARGETS, SET_COLOURS[3:6], WIDTHS, strict=True):
        loss, _, by_negatives = slopes(objective, torch.full_like(negatives, place), negatives)
        axes[2].plot(negatives, loss, color=colour, linewidth=width, label=f"$z_y = {place:g}$")
        axes[3].plot(negatives, by_negatives, color=colour, linewidth=width)
    # The slope by the target may grow without bound as |z_y| → 1; the picture ends at 2.5 times the scale.
    axes[1].set_ylim(0, min(2.5 * scale, axes[1].get_ylim()[1]))
    axes[3].set_ylim(0, 1.05)
    for panel, x, y in (
        (axes[0], "z_y", "loss"),
        (axes[1], "z_y", r"pull  $-\partial$loss$/\partial z_y$"),
        (axes[2], symbol, "loss"),
        (axes[3], symbol, rf"push  $\partial$loss$/\partial {symbol}$"),
    ):
        panel.set_xlabel(f"${x}$")
        panel.set_ylabel(y)
    axes[0].legend()
    axes[2].legend()
    return figure


def draw_together(shown: dict[str, Objective]) -> Figure:
    """What each objective does to the embedding: the slope by the target along the sphere, against the angle."""
    theta = torch.linspace(0.02, math.pi - 0.02, POINTS, dtype=torch.float64)
    scenes: list[tuple[str, Callable[[Objective], float]]] = [
        ("100,000 random negatives, 512 dimensions", _random_negatives),
        (r"one negative of cosine 0.5 outweighs all others: $\ell = s/2$", lambda objective: _scale(objective) / 2),
    ]
    figure = Figure(figsize=(10.5, 3.6), layout="constrained")
    axes: Sequence[Axes] = figure.subplots(1, 2, sharey=True)
    colours = (*SET_COLOURS, "#1b7f9c")
    widths = torch.linspace(4.0, 1.2, len(shown)).tolist()  # softmax, CosFace and D-Softmax share a stretch
    for panel, (title, level) in zip(axes, scenes, strict=True):
        for index, (name, objective) in enumerate(shown.items()):
            _, by_target, _ = slopes(objective, torch.cos(theta), torch.full_like(theta, level(objective)))
            pull = -by_target * torch.sin(theta) / _scale(objective)
            panel.plot(
                torch.rad2deg(theta),
                pull,
                color=GREY if name == "combined" else colours[index % len(colours)],
                linestyle=(0, (4, 2)) if name == "combined" else "-",
                linewidth=widths[index],
                label=name,
            )
        panel.set_title(title, fontsize=9)
        panel.set_xlabel(r"angle $\theta_y$ to the own center (degrees)")
        panel.set_xticks(range(0, 181, 30))
    axes[0].set_ylabel(r"pull on the embedding / $s$")
    axes[0].set_ylim(0, 1.4)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center")
    return figure


def _random_negatives(objective: Objective, classes: int = 100_000, dim: int = 512) -> float:
    """The negatives' number for random directions, whose cosines are normal with variance 1/dim, nearly."""
    if isinstance(objective, SquaresObjective):
        return classes / dim
    return math.log(classes) + _scale(objective) ** 2 / (2 * dim)


def _scale(objective: Objective) -> float:
    return getattr(objective, "scale", 1.0)


def _title(name: str, objective: Objective) -> str:
    values = {key: value for key, value in vars(objective).items() if value is not None and "annealing" not in key}
    return name + ":  " + (", ".join(f"{key} {value:g}" for key, value in values.items()) or "no parameters")


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, metadata={"Date": None})
    return path


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:2]))
