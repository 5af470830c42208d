"""Draws the figures of docs/objectives.md from the objectives themselves.

python docs/images/plot_objectives.py [FOLDER]        # beside this file when no folder is given
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
from pfc.partial_fc.objectives import Numbers, Objective, SoftplusObjective, SquaresObjective
from pfc.partial_fc.objectives.state import ObjectiveState

IMAGES = Path(__file__).parent
SHOWN: dict[str, dict[str, Any]] = {
    "combined": {"m1": 1.1, "m2": 0.2, "m3": 0.1},  # its defaults are softmax
    "adaface": {"concentration": 4.0},  # so that norms of 0 to 40 spread as in a training that has gone on
}
SEEN = {"adaface": ("norm", (1.0, 20.0, 45.0)), "magface": ("norm", (10.0, 60.0, 110.0))}
"""What the curves of an objective differ in, where it is not the negatives."""
FOR_NOISE = "noise", (-2.0, 0.0, 2.0)
CLASSES = 100_000
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
        alike = {name: one for name, one in shown.items() if _sees_two_numbers(one)}
        files.append(_save(draw_together(alike), folder / "objectives-together.svg"))
    return files


def slopes(
    objective: Objective, target: Tensor, negatives: Tensor, norm: float = 20.0, noise: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, ∂loss/∂target and ∂loss/∂negatives of each sample [B], float64, by autograd; with the first state."""
    target, negatives = (numbers.double().detach().requires_grad_() for numbers in (target, negatives))
    others = {"norm": torch.full_like(target, norm), "noise": torch.full_like(target, noise)}
    loss = objective(target, negatives, **others, state=_state(objective))
    by_target, by_negatives = torch.autograd.grad(loss.sum(), (target, negatives))
    return loss.detach(), by_target, by_negatives


def draw_one(name: str, objective: Objective) -> Figure:
    """Loss and slopes of one objective: against the target at three negatives, and the other way round."""
    scale = _scale(objective)
    if isinstance(objective, SquaresObjective):
        symbol, levels, widest = "q", SQUARES, 4.0
    elif isinstance(objective, SoftplusObjective):
        symbol, levels, widest = "u", (0.0, 20.0, 40.0), 60.0
    else:
        symbol, levels, widest = r"\ell", [scale * cosine for cosine in COSINES], scale
    figure = Figure(figsize=(10.5, 2.9), layout=ConstrainedLayoutEngine(wspace=0.05))
    figure.suptitle(_title(name, objective), fontsize=10, x=0.01, ha="left")
    axes: Sequence[Axes] = figure.subplots(1, 4)
    target = torch.linspace(-0.999, 0.999, POINTS)
    differs, values = SEEN.get(name, FOR_NOISE) if objective.sees else (symbol, levels)
    for level, colour, width in zip(values, SET_COLOURS[:3], WIDTHS, strict=True):
        others = {differs: level} if objective.sees else {}
        negatives = torch.full_like(target, levels[1] if objective.sees else level)
        loss, by_target, _ = slopes(objective, target, negatives, **others)
        told = rf"\mathrm{{{differs}}}" if objective.sees else symbol
        axes[0].plot(target, loss, color=colour, linewidth=width, label=f"${told} = {level:g}$")
        axes[1].plot(target, -by_target, color=colour, linewidth=width)
    negatives = torch.linspace(0.0, widest, POINTS)
    for place, colour, width in zip(TARGETS, SET_COLOURS[3:6], WIDTHS, strict=True):
        loss, _, by_negatives = slopes(objective, torch.full_like(negatives, place), negatives)
        axes[2].plot(negatives, loss, color=colour, linewidth=width, label=f"$z_y = {place:g}$")
        if objective.hard_by == "constant":
            axes[3].plot(negatives, by_negatives, color=colour, linewidth=width)
    counts = "push", rf"push  $\partial$loss$/\partial {symbol}$"
    if objective.hard_by != "constant":
        _draw_hard(axes[3], objective)
        counts = "z_k", "counts as"
    # The slope by the target may grow without bound as |z_y| → 1; the picture ends at 2.5 times the scale.
    axes[1].set_ylim(0, min(2.5 * scale, axes[1].get_ylim()[1]))
    if isinstance(objective, SoftplusObjective):
        axes[3].set_ylim(0, 2 * axes[3].get_ylim()[1])
    elif objective.hard_by == "constant":
        axes[3].set_ylim(0, 1.05)
    for panel, x, y in (
        (axes[0], "z_y", "loss"),
        (axes[1], "z_y", r"pull  $-\partial$loss$/\partial z_y$"),
        (axes[2], symbol, "loss"),
        (axes[3], symbol if counts[0] == "push" else counts[0], counts[1]),
    ):
        panel.set_xlabel(f"${x}$")
        panel.set_ylabel(y)
    axes[0].legend()
    axes[2].legend()
    return figure


def _draw_hard(panel: Axes, objective: Objective) -> None:
    """What a negative's cosine counts as, for a sample with z_y = 0.8; the curriculum's t is 0.3 and 0.6."""
    cosine = torch.linspace(-0.2, 1.0, POINTS, dtype=torch.float64)
    target = torch.full_like(cosine, 0.8)
    largest = torch.full((POINTS, objective.top_k + 1), 0.5, dtype=torch.float64) if objective.top_k else None
    panel.plot(cosine, cosine, color=GREY, linestyle=(0, (4, 2)), linewidth=1.0)
    for moved, colour in zip((0.3, 0.6), SET_COLOURS[:2], strict=True):
        state = {name: torch.tensor(moved) for name in objective.first_state(CLASSES)}
        hard = objective.hard(Numbers(target, state=state), largest)
        assert hard is not None
        panel.plot(cosine, hard.transform(cosine)[0], color=colour, label=f"$t = {moved:g}$" if state else None)
        if not state:
            break
    if panel.get_legend_handles_labels()[0]:
        panel.legend()


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


def _sees_two_numbers(objective: Objective) -> bool:
    return not objective.sees and objective.hard_by == "constant" and not isinstance(objective, SoftplusObjective)


def _state(objective: Objective) -> dict[str, Tensor]:
    kept = ObjectiveState(objective, CLASSES, torch.device("cpu"), torch.float64)
    return {name: value.detach() for name, value in kept.state_dict().items()} | (
        {"norm_mean": torch.tensor(20.0), "norm_deviation": torch.tensor(20.0)} if "norm" in objective.sees else {}
    )


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
