"""The model card of a run: what it was trained on and how, what it reached, how to load it. No path of the machine."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from ...data.errors import UsageError
from ..checkpoint import CONFIG, Found
from ..checkpoint.directory import EVALUATION, FOLDER
from ..config import Config, Generated, load_config
from ..evaluation.figures import shown, title
from ..log.telemetry import read_json_lines
from ..training_data import open_dataset

_STEPS = "`pfc threshold RUN --on SET --fmr 1e-4` chooses it on images like yours."


@dataclass(frozen=True)
class Measured:
    """One line of evaluation.jsonl: which set, at which step, and its figures."""

    set: str
    step: int
    values: Mapping[str, Any]

    def figures(self) -> list[tuple[str, str, str]]:
        """(field, title, value with its interval) of each."""
        return [
            (name, told, shown(self.values, name))
            for name, value in self.values.items()
            if isinstance(value, float) and name != "seconds" and (told := title(name)) is not None
        ]


def model_card(
    name: str, found: Found, *, onnx: str | None, licence: str | None = None, threshold: Path | None = None
) -> str:
    """The text of README.md, with its YAML front matter.

    Args:
        name: of the model.
        found: the checkpoint that it is.
        onnx: what was measured of model.onnx; None where that is not there.
        licence: an identifier of the Hub, such as ``apache-2.0``.
        threshold: what ``pfc threshold --json`` has printed.

    Raises:
        UsageError: the threshold's file is none.
    """
    config = load_config(found.path / CONFIG)
    evaluations = _evaluations(found)
    front = _front_matter(name, config, evaluations, licence)
    sections = [
        f"# {name}",
        _summary(config),
        "## Load it\n\n" + _loading(config, onnx),
        "## Training data\n\n" + _data(config, found),
        "## Recipe\n\n" + _recipe(config, found),
        "## Evaluation\n\n" + _evaluation(found, evaluations),
        "## Threshold\n\n" + _threshold(threshold, evaluations),
        "## Intended use and limits\n\n" + _limits(config, licence),
    ]
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n" + "\n\n".join(sections) + "\n"


def _evaluations(found: Found) -> list[Measured]:
    """The last evaluation of each set up to this checkpoint; of the run's log, or what the checkpoint says."""
    folder = found.path.resolve().parent
    last: dict[str, Measured] = {
        name: Measured(name, found.step, values)
        for name, values in found.state().get(EVALUATION, {}).items()
        if isinstance(values, dict)
    }
    for line in read_json_lines(folder.parent / "evaluation.jsonl") if folder.name == FOLDER else ():
        if "set" in line and line.get("step", found.step + 1) <= found.step:
            last[line["set"]] = Measured(line["set"], line["step"], line)
    return list(last.values())


def _front_matter(name: str, config: Config, found: Sequence[Measured], licence: str | None) -> dict[str, Any]:
    front: dict[str, Any] = {} if licence is None else {"license": licence}
    front |= {"library_name": "pfc", "pipeline_tag": "image-feature-extraction"}
    front["tags"] = ["embeddings", "metric-learning", "partial-fc", config.backbone.name.replace("/", "-")]
    results = [
        {
            "task": {"type": "image-feature-extraction"},
            "dataset": {"type": one.set, "name": one.set},
            "metrics": [{"type": key, "name": told, "value": one.values[key]} for key, told, _ in one.figures()],
        }
        for one in found
        if one.figures()
    ]
    return front | ({"model-index": [{"name": name, "results": results}]} if results else {})


def _summary(config: Config) -> str:
    height, width = config.data.image_size or (0, 0)
    return (
        f"A `{config.backbone.name}` that maps RGB images of {height}×{width} to embeddings of "
        f"{config.backbone.embedding_dim} numbers, whose cosine says how alike two images are. Trained with pfc."
    )


def _loading(config: Config, onnx: str | None) -> str:
    needs = "pfc[hub,timm]" if config.backbone.name.startswith("timm/") else "pfc[hub]"
    text = f"""With `pip install '{needs}'`:

```python
import torch
from PIL import Image
from pfc.engine.sharing.hub import EmbeddingNetwork

network = EmbeddingNetwork.from_pretrained("FOLDER_OR_REPOSITORY")
images = network.preprocess([Image.open("a.jpg"), Image.open("b.jpg")])  # float32 [2, 3, H, W]
with torch.inference_mode():
    a, b = network(images)  # each of length 1
print(float(a @ b))  # their cosine
```"""
    if ":" in config.backbone.name:
        module = config.backbone.name.partition(":")[0]
        text += f"\n\nThe backbone is code of its author: the module `{module}` must be on the Python path."
    if config.evaluation.flip:
        text += (
            "\n\nAn embedding is the image's and its mirror image's, added, as in the evaluation below; "
            "`from_pretrained(..., flip=False)` leaves the mirror image out, in half the time."
        )
    if onnx is not None:
        mirrored = " + session.run(None, {'images': x[..., ::-1].copy()})[0]" if config.evaluation.flip else ""
        height, width = config.data.image_size or (0, 0)
        text += f"""

With onnxruntime alone ({onnx}):

```python
import numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("model.onnx")
upright = ImageOps.exif_transpose(Image.open("a.jpg")).convert("RGB")  # of 8 bits
image = ImageOps.fit(upright, ({width}, {height}), Image.Resampling.BILINEAR)
x = (np.asarray(image, np.float32).transpose(2, 0, 1)[None] - 127.5) / 127.5
a = session.run(None, {{'images': x}})[0]{mirrored}
a /= np.linalg.norm(a)
```"""
    return text


def _data(config: Config, found: Found) -> str:
    identities = found.state()["num_classes"]
    told = "an unknown number of" if identities is None else f"{identities:,}"
    if isinstance(config.data.train, Generated):
        return f"Images that pfc computes, of {told} identities."
    names = ", ".join(f"`{_name_of(source.path)}`" for source in config.data.sources)
    try:
        images = f"{len(open_dataset(config)):,} images"
    except (UsageError, OSError):
        images = "an unknown number of images (the set is not where the card was written)"
    return f"{names}: {images} of {told} identities. Where the images come from is not stated."


def _name_of(path: str) -> str:
    """The last part of a path or an address, without what may be secret of one."""
    if "://" not in path:
        return Path(path).name
    address = urlsplit(path)
    return Path(address.path).name or address.hostname or "a remote set"


def _recipe(config: Config, found: Found) -> str:
    state, head, schedule = found.state(), config.head, config.schedule
    parameters = [f"{key} {value}" for key, value in (head.objective.model_extra or {}).items() if value is not None]
    backbone, centers = config.optimizer.backbone, config.optimizer.head
    ranks = state.get("world_size")
    batch = "unknown" if not ranks else f"{config.images_per_step(ranks):,} images, on {ranks} rank(s)"
    length = f"{schedule.steps:,} steps" if schedule.steps is not None else f"{schedule.epochs:g} epochs"
    started = Path(config.init.path).name if config.init.path is not None else None
    rows = {
        "checkpoint": f"`{found.path.resolve().name}`",
        "backbone": f"`{config.backbone.name}`, {config.backbone.embedding_dim} numbers",
        "objective": f"`{head.objective.name}`" + (f" ({', '.join(parameters)})" if parameters else ""),
        "sample rate": f"{head.sample_rate:g}" + (", later other rates" if head.sample_rate_schedule else ""),
        "steps": f"{found.step:,} of a schedule of {length}",
        "batch": batch,
        "optimizer of the backbone": f"`{backbone.name}`, lr {backbone.lr:g}, weight decay {backbone.weight_decay:g}",
        "optimizer of the centers": f"`{centers.name}`, lr {centers.lr:g}, weight decay {centers.weight_decay:g}",
        "learning rate": f"{schedule.name}, {schedule.warmup_steps:,} steps of warm-up",
        "precision": config.precision,
        "average of the weights": f"these are it (decay {config.backbone.ema:g})" if config.backbone.ema else "none",
        "began with": f"`{started}`" if started else "random weights",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])


def _evaluation(found: Found, evaluations: Sequence[Measured]) -> str:
    rows = [(one, told, value) for one in evaluations for _, told, value in one.figures()]
    if not rows:
        return "This checkpoint was not evaluated."
    steps = {one.step for one in evaluations}
    which = (
        "Of this checkpoint."
        if steps == {found.step}
        else "Of the last evaluation of each set up to this checkpoint; the steps are in the table."
    )
    return "\n".join(
        [
            f"{which} ± is a standard deviation over folds, brackets are 95 % intervals.",
            "",
            "| set | step | figure | value |",
            "|---|---|---|---|",
            *(f"| {one.set} | {one.step:,} | {told} | {value} |" for one, told, value in rows),
        ]
    )


def _threshold(path: Path | None, evaluations: Sequence[Measured]) -> str:
    if path is None:
        told = [
            f"On the pairs of {one.set} the most accurate cosine is {one.values['threshold']:.4f}."
            for one in evaluations
            if isinstance(one.values.get("threshold"), float)
        ]
        return " ".join([*told, "None was chosen for a false match rate:", _STEPS])
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        chosen, rate, first = float(told["threshold"]), float(told["fmr"]), told["sets"][0]
        lines = [
            f"Two images whose cosine is {chosen:.4f} or more are taken for one identity: chosen for a false match "
            f"rate of {rate:g} on {Path(first['set']).name}.",
            "",
            "| set | false match rate | false non-match rate |",
            "|---|---|---|",
            *(f"| {Path(one['set']).name} | {one['fmr']:.2e} | {one['fnmr']:.4f} |" for one in told["sets"]),
        ]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise UsageError(f"--threshold {path}: {reason}; give what pfc threshold --json has printed") from None
    return "\n".join([*lines, "", "It holds for people and images like those. " + _STEPS])


def _limits(config: Config, licence: str | None) -> str:
    height, width = config.data.image_size or (0, 0)
    lines = [
        "For comparing images of the kind that it was trained on, prepared in the same way.",
        f"Images of another size are scaled to cover {height}×{width} and cropped at the centre; faces have to be "
        "aligned as those of the training data were.",
        "The figures above hold for their sets; on other people, cameras or conditions they will differ, and a "
        "threshold too. How it does for groups of people is not stated.",
        f"Licence: {licence or 'not stated'}.",
    ]
    return "\n".join(f"* {line}" for line in lines)
