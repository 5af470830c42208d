"""The figures of a sweep as a picture."""

from pathlib import Path

from ..head.case import Line
from ..head.memory import bytes_needed
from .sweep import ScaleResults
from .table import series

_COLOURS = {
    "pfc": ["#1b6ca8", "#2a9d8f", "#6a4c93", "#0b3c5d", "#7fb069", "#3a86ff"],
    "dense": ["#8a8a8a", "#5c5c5c", "#b5b5b5"],
    "peer": ["#d1791f", "#a63d1b", "#e0a458"],
}
_MARKS = {"pfc": "o", "dense": "s", "peer": "D"}


def plot(results: ScaleResults, file: Path) -> None:
    """Samples a second, and memory of a rank, against the classes; what does not fit is a cross.

    In the picture of memory it stands where it would need to be, in that of throughput at the bottom.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    speed, memory = figure.subplots(1, 2)
    every: dict[str, list[Line]] = {}
    for line in results.lines:
        every.setdefault(series(line.case, results.sweep), []).append(line)
    colours = {head: iter(2 * found) for head, found in _COLOURS.items()}
    for place, (name, lines) in enumerate(every.items()):
        head = lines[0].case.head
        style = {"color": next(colours[head], "black"), "marker": _MARKS[head], "markersize": 5}
        if lines[0].case.simulated:
            style |= {"linestyle": "--", "markerfacecolor": "white"}
        fitting, missing = [line for line in lines if line.rounds], [line for line in lines if not line.rounds]
        classes = [line.case.classes for line in fitting]
        speed.plot(classes, [line.case.batch / line.fastest for line in fitting], label=name, **style)
        memory.plot(classes, [line.peak_bytes / 2**30 for line in fitting], **style)
        crosses = {"color": style["color"], "marker": "x", "linestyle": "none", "markersize": 8, "markeredgewidth": 2}
        classes = [line.case.classes for line in missing]
        speed.plot(classes, [0.03 + 0.04 * place] * len(missing), transform=speed.get_xaxis_transform(), **crosses)
        memory.plot(classes, [bytes_needed(line.case) / 2**30 for line in missing], **crosses)
    for processes in sorted({line.case.processes for line in results.lines}):
        share = results.free / 2**30 / processes
        memory.axhline(share, color="black", linewidth=0.8, linestyle=":")
        memory.annotate(f"free for each of {processes}", (0.01, share), xycoords=("axes fraction", "data"), fontsize=8)
    for axis, title in ((speed, "samples a second"), (memory, "memory of a rank, GiB")):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("classes (×: does not fit)")
        axis.set_title(title, fontsize=11)
        axis.grid(which="major", color="#e4e4e4", linewidth=0.7)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(3, len(every)), frameon=False, fontsize=9)
    figure.savefig(file, dpi=120)
