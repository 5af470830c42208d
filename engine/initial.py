"""The beginning of a run from what another one learned: its backbone, and if wanted its centers."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..data.errors import UsageError
from . import checkpoint, label_map
from .backbones.from_timm import TimmBackbone
from .build import Parts
from .config import Config
from .torch_files import TorchFile

_CENTERS = "head/centers"
_SHOWN = 4  # names, where there are many


def begin(config: Config, parts: Parts, labels: bytes | None) -> list[str]:
    """Loads what ``config.init`` names into a new run's parts; returns what is to be told.

    Args:
        config: of the run, completed.
        parts: fresh.
        labels: the label map of the run's data set.

    Raises:
        UsageError: the file, its weights or its classes do not fit.
    """
    section = config.init
    if section.path is None:
        return []
    path = Path(section.path)
    if path.is_file():
        if section.centers != "new":
            raise UsageError(
                f"init.centers: {path} is a file of weights without centers; give a run or checkpoint, or centers: new"
            )
        return [f"begins     with the backbone of {path}{_take_file(parts, path, section.partial)}, new centers"]
    source = checkpoint.find(path)
    told = f"begins     with the backbone of {source.path}{_take_backbone(parts, source, section.partial)}"
    if section.centers == "new":
        return [f"{told}, new centers"]
    _check_centers(parts, source)
    if section.centers == "keep":
        _keep_centers(config, parts, source, labels)
        return [f"{told} and its centers"]
    classes = label_map.mapping(labels, source.path / checkpoint.LABELS)
    _map_centers(parts, source, classes)
    taken = int((classes >= 0).sum())
    return [f"{told} and its centers of {taken:,} identities by name; {len(classes) - taken:,} are new"]


def _weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise UsageError(f"{path} is damaged, or no safetensors file: {error}") from None
    file = TorchFile.read(path)
    if file.at("state_dict_backbone") is not None:
        return file.tensors("state_dict_backbone")
    return file.tensors()


def _take_file(parts: Parts, path: Path, partial: bool) -> str:
    weights = {name.removeprefix("module."): value for name, value in _weights(path).items()}
    here = parts.network.state_dict()
    if isinstance(parts.network, TimmBackbone) and not here.keys() & weights.keys():
        try:
            weights = parts.network.translate(weights)
        except Exception as error:  # timm's own conversion, of a file that is no model of this kind
            raise UsageError(
                f"init.path: {path} does not hold weights of this model: {type(error).__name__}: {error}"
            ) from None
    taken, told = _fitting(here, {name: value.shape for name, value in weights.items()}, path, partial)
    parts.network.load_state_dict({name: weights[name] for name in taken}, strict=False)
    _begin_average(parts)
    return told


def _take_backbone(parts: Parts, source: checkpoint.Found, partial: bool) -> str:
    there = {name: entry.size for name, entry in source.shapes().items()}
    prefix = checkpoint.AVERAGE if any(name.startswith(checkpoint.AVERAGE) for name in there) else checkpoint.BACKBONE
    sizes = {name.removeprefix(prefix): size for name, size in there.items() if name.startswith(prefix)}
    taken, told = _fitting(parts.network.state_dict(), sizes, source.path, partial)
    tensors = checkpoint.network_tensors(parts.network, prefix)
    checkpoint.load(source, {f"{prefix}{name}": tensors[f"{prefix}{name}"] for name in taken})
    _begin_average(parts)
    return told


def _begin_average(parts: Parts) -> None:
    if parts.average is not None:
        parts.average.restart(parts.network)


def _fitting(
    network: Mapping[str, Tensor], there: Mapping[str, torch.Size], path: Path, partial: bool
) -> tuple[list[str], str]:
    """The names that are to be loaded, and what is told of the others."""
    here = {name: value.shape for name, value in network.items()}
    taken = [name for name in here if here[name] == there.get(name)]
    others = [name for name in dict.fromkeys([*here, *there]) if here.get(name) != there.get(name)]
    if not others:
        return taken, ""
    if not partial:
        told = [
            str(list(size)) if size is not None else "missing" for size in (there.get(others[0]), here.get(others[0]))
        ]
        raise UsageError(
            f"init.path: {path} is another network: {others[0]} is {told[0]} there and {told[1]} here; set backbone as "
            "it was trained, or init.partial: true to take what fits"
        )
    if not taken:
        raise UsageError(
            f"init.path: nothing in {path} fits this backbone: it has {', '.join(list(there)[:3])}, ..., the backbone "
            f"{', '.join(list(here)[:3])}, ..."
        )
    kinds = {
        "not there": [name for name in others if name not in there],
        "of another shape": [name for name in others if name in here and name in there],
        "not used": [name for name in others if name not in here],
    }
    shown = [
        f"{kind}: {', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' * (len(names) > _SHOWN)}"
        for kind, names in kinds.items()
        if names
    ]
    return taken, f" ({len(taken)} of {len(here)} tensors; {'; '.join(shown)})"


def _check_centers(parts: Parts, source: checkpoint.Found) -> None:
    entry, shape = source.shapes().get(_CENTERS), parts.head.centers.shape[1:]
    if entry is None:
        raise UsageError(f"init.centers: {source.path} holds a backbone without centers: give centers: new")
    if entry.size[1:] != shape:
        there, here = (" × ".join(map(str, size)) for size in (entry.size[1:], shape))
        raise UsageError(
            f"init.centers: {source.path} has centers of {there} numbers, this run of {here}: set head.sub_centers as "
            "it was trained, or give centers: new"
        )


def _keep_centers(config: Config, parts: Parts, source: checkpoint.Found, labels: bytes | None) -> None:
    there, here = source.shapes()[_CENTERS].size[0], parts.head.num_classes
    if there != here:
        raise UsageError(
            f"init.centers keep: {source.path} has {there:,} classes, this run's data set has {here:,}: give centers: "
            "new, or by_name to carry over those of the same names"
        )
    check_labels(config, source, labels)
    centers = parts.head.centers
    checkpoint.load(source, {_CENTERS: centers})


def _map_centers(parts: Parts, source: checkpoint.Found, classes: Tensor) -> None:
    """One of the source's pieces at a time, so that no rank ever holds more of it."""
    for first, rows in checkpoint.read_pieces(source, _CENTERS):
        within = (classes >= first) & (classes < first + len(rows))
        parts.head.load_centers(rows, torch.where(within, classes - first, -1))


def check_labels(config: Config, source: checkpoint.Found, labels: bytes | None) -> None:
    """UsageError where the centers belong to other identities than this run's, as far as both are known by name."""
    there, here = source.state().get("label_map"), label_map.hash_of(labels)
    if config.checkpoint.check_labels and None not in (there, here) and there != here:
        raise UsageError(
            f"{source.path} was trained on other identities than those of data.train, or in another order (their "
            "labels.json differ): give that data set, or take the backbone alone, with init.path in a run of another "
            "name; checkpoint.check_labels=false goes on all the same"
        )
