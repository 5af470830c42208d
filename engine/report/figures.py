"""The report's figures, each returned as the data URI of an SVG."""

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..evaluation.every_pair import edges
from .record import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..evaluation.threshold import OperatingPoint

Series = tuple[NDArray[np.float64], NDArray[np.float64]]

BLUE, ORANGE, GREY, INK = "#2563ab", "#d9731a", "#8b949e", "#24292f"
SET_COLOURS = (BLUE, ORANGE, "#2b8a57", "#8a4fa8", "#b23a48", "#5b6470")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#c4cad0",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8ebee",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "svg.hashsalt": "pfc",  # the same data give the same file
}
MOST_POINTS = 1000
SMOOTHED_FROM = 60  # logged values


def loss_curve(loss: Series) -> str:
    """Loss over steps; of a long series each logged value pale, and their running mean on top."""
    steps, values = _thinned(loss)

    def draw(axes: "Axes") -> None:
        if len(steps) < SMOOTHED_FROM:
            axes.plot(steps, values, color=BLUE)
            return
        axes.plot(steps, values, color=BLUE, alpha=0.3, linewidth=0.9, label="logged")
        axes.plot(steps, _running_mean(values), color=BLUE, label="running mean")
        axes.legend()

    return _render(draw, "step", "loss of the global batch")


def rate_curve(rate: Series) -> str:
    """Learning rate of the backbone over steps."""
    steps, values = _thinned(rate)

    def draw(axes: "Axes") -> None:
        axes.plot(steps, values, color=BLUE)
        axes.set_ylim(bottom=0)

    return _render(draw, "step", "learning rate")


def speed_curve(speed: Series) -> str:
    """Images per second of all ranks together, over steps."""
    steps, values = _thinned(speed)

    def draw(axes: "Axes") -> None:
        axes.plot(steps, values, color=BLUE)
        axes.set_ylim(bottom=0)

    return _render(draw, "step", "images/s, all ranks")


def overlaid(series: Mapping[str, Series], label: str) -> str:
    """One quantity of several runs over steps; of long series their running means."""

    def draw(axes: "Axes") -> None:
        for (name, one), colour in zip(series.items(), _colours(len(series)), strict=True):
            steps, values = _thinned(one)
            if len(steps) >= SMOOTHED_FROM:
                values = _running_mean(values)
            few = len(steps) < 30
            axes.plot(steps, values, color=colour, marker="o" if few else None, markersize=3.5, label=name)
        axes.legend()

    return _render(draw, "step", label)


def with_intervals(
    lines: Mapping[str, Sequence[tuple[int, float, float]]], labels: Sequence[str], across: str, called: str
) -> str:
    """A figure at each label, (place, mean, half of the interval), one line for each name."""

    def draw(axes: "Axes") -> None:
        for number, ((name, points), colour) in enumerate(zip(lines.items(), _colours(len(lines)), strict=True)):
            places, means, halves = np.array(points, dtype=float).T
            shifted = places + 0.06 * (number - (len(lines) - 1) / 2)  # so that bars do not hide each other
            axes.errorbar(
                shifted, means, np.nan_to_num(halves), color=colour, marker="o", markersize=3.5, capsize=2, label=name
            )
        axes.set_xticks(range(len(labels)), labels, rotation=0 if sum(map(len, labels)) < 60 else 30)
        if len(lines) > 1:
            axes.legend()

    return _render(draw, across, called)


def accuracy_curve(accuracies: Mapping[str, Series]) -> str:
    """The leading figure of every set in percent over steps, one line per set."""

    def draw(axes: "Axes") -> None:
        for (name, (steps, values)), colour in zip(accuracies.items(), _colours(len(accuracies)), strict=True):
            axes.plot(steps, 100 * values, color=colour, marker="o", markersize=3.5, label=name)
        axes.set_ylim(top=100.8)
        axes.legend(loc="lower right")

    return _render(draw, "step", "share (%)")


def histogram(scores: Scores, threshold: float | None) -> str:
    """Cosines of the pairs of one and of two identities, each as shares of their own number."""
    edges = np.linspace(min(float(scores.cosine.min()), 0.0), max(float(scores.cosine.max()), 1.0), 61)

    def draw(axes: "Axes") -> None:
        kinds = ((~scores.same, ORANGE, "different identities"), (scores.same, BLUE, "same identity"))
        for kind, colour, name in kinds:
            count = int(kind.sum())
            axes.hist(
                scores.cosine[kind],
                bins=edges.tolist(),
                weights=np.full(count, 100 / max(count, 1)),
                color=colour,
                alpha=0.65,
                label=f"{name} ({count:,})",
            )
        if threshold is not None:
            axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"threshold {threshold:.3f}")
        axes.legend()

    return _render(draw, "cosine of the two embeddings", "share of the pairs (%)")


def roc(scores: Scores, untrained: Scores | None) -> str:
    """True accept rate over the false accept rate, which is on a logarithmic axis down to one false accept."""
    lowest = 1 / max(int((~scores.same).sum()), 1)

    def draw(axes: "Axes") -> None:
        axes.step(*_roc_points(scores), where="post", color=BLUE, label="trained")
        if untrained is not None:
            axes.step(*_roc_points(untrained), where="post", color=GREY, linestyle=(0, (4, 3)), label="untrained")
        axes.set_xscale("log")
        axes.set_xlim(lowest, 1)
        axes.set_ylim(0, 102)
        axes.legend(loc="lower right")

    return _render(draw, "false accept rate (share of the pairs of two identities)", "true accept rate (%)")


_CURVES = {
    "tar": ("TAR at FAR", "false accept rate", "true accept rate (%)"),
    "cmc": ("Found among the first k", "k", "share of the probes (%)"),
    "tpir": ("TPIR at FPIR", "false positive identification rate", "true positive identification rate (%)"),
    "distractors": ("Rank-1 among distractors", "number of distractors", "share of the searches (%)"),
}
"""Of a protocol: title, axes."""


def protocol_curves(curves: Mapping[str, NDArray[np.float64]]) -> list[tuple[str, str]]:
    """(title, figure) of each curve of a judgement, with the band of its intervals."""
    drawn = []
    for name, curve in curves.items():
        if curve.shape[1] > 1:
            title, x, y = _CURVES[name]
            drawn.append((title, _render(partial(_draw_band, curve), x, y)))
    return drawn


def _draw_band(curve: NDArray[np.float64], axes: "Axes") -> None:
    x, y, low, high = curve
    axes.plot(x, 100 * y, color=BLUE, marker="o", markersize=2.5)
    if np.isfinite(low).any():
        axes.fill_between(x, 100 * low, 100 * high, color=BLUE, alpha=0.18, linewidth=0, label="95 % interval")
        axes.legend(loc="lower right")
    axes.set_xscale("log")
    axes.set_ylim(0, 102)
    if x.min() >= 1:  # numbers of images, not rates
        from matplotlib.ticker import StrMethodFormatter

        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def rates_over_threshold(points: Sequence["OperatingPoint"], threshold: float) -> str:
    """False match rate (solid) and false non-match rate (dashed) of every threshold, on each set."""

    def draw(axes: "Axes") -> None:
        for point, colour in zip(points, _colours(len(points)), strict=True):
            thresholds = edges()[:-1]
            chosen = np.arange(0, len(thresholds), len(thresholds) // MOST_POINTS)
            for rates, style, told in (
                (point.scores.false_match_rate, "-", "false matches"),
                (point.scores.false_non_match_rate, "--", "false non-matches"),
            ):
                seen = chosen[rates[chosen] > 0]
                axes.plot(thresholds[seen], rates[seen], color=colour, linestyle=style, label=f"{told}, {point.name}")
        axes.axvline(threshold, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"threshold {threshold:.4f}")
        axes.set_yscale("log")
        axes.legend(loc="lower left")

    return _render(draw, "threshold, a cosine", "rate")


def calibration(chosen: "OperatingPoint", others: Sequence["OperatingPoint"]) -> str:
    """What false match rate the others get of the thresholds that the chosen set gives for each rate."""
    asked = chosen.scores.false_match_rate
    places = np.flatnonzero(np.diff(asked, prepend=2.0) < 0)
    places = places[np.unique(np.linspace(0, len(places) - 1, MOST_POINTS).round().astype(int))]

    def draw(axes: "Axes") -> None:
        rates = asked[places]
        axes.plot(rates, rates, color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="as asked for")
        for point, colour in zip(others, _colours(len(others)), strict=True):
            got = point.scores.false_match_rate[places]
            axes.plot(rates[got > 0], got[got > 0], color=colour, label=point.name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.legend(loc="upper left")

    return _render(draw, f"false match rate asked for, on {chosen.name}", "false match rate got")


def _render(draw: Callable[["Axes"], None], x_label: str, y_label: str) -> str:
    """One figure in the report's style, without pyplot, whose state is global."""
    from matplotlib import rc_context  # slow to import: only the report pays for it
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        draw(axes)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        if x_label == "step":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _thinned(series: Series) -> Series:
    """At most ``MOST_POINTS`` of a long series, evenly chosen, its last one among them."""
    steps, values = series
    if len(steps) <= MOST_POINTS:
        return series
    chosen = np.linspace(0, len(steps) - 1, MOST_POINTS).round().astype(int)
    return steps[chosen], values[chosen]


def _running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over about a thirtieth of the series, shorter at its ends; not-finite values do not count."""
    window = np.ones(2 * (len(values) // 60) + 1)
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), window, "same")
    count = np.convolve(finite.astype(float), window, "same")
    return np.divide(total, count, out=np.full(len(values), np.nan), where=count > 0)


def _roc_points(scores: Scores) -> Series:
    from sklearn.metrics import roc_curve

    false_accepts, true_accepts, _ = roc_curve(scores.same, scores.cosine)
    return false_accepts, 100 * true_accepts


def _colours(number: int) -> list[str]:
    return [SET_COLOURS[i % len(SET_COLOURS)] for i in range(number)]
