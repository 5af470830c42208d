"""Files that `pfc convert` does not take, or not all of; and what must never be run."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pfc.data.errors import UsageError
from pfc.engine.convert import convert as converting
from pfc.engine.convert.convert import convert
from tests.engine.convert.common_files import CLASSES, DIM, Files, leave, read_all, small_files, write


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave(tmp_path_factory.mktemp("common") / "run")


class Scheduler:
    """What a scheduler's state may hold: an object of somebody's class."""


class Command:
    """Runs a command when it is unpickled the usual way."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


def test_objects_where_nobody_looks_are_not_loaded(tmp_path: Path) -> None:
    files = small_files()
    files[0]["state_lr_scheduler"] = {"anneal": Scheduler(), "rate": np.float64(0.1)}
    (note,) = convert(write(tmp_path / "in", files), tmp_path / "out").notes
    assert "Scheduler" in note
    assert read_all(tmp_path / "out")["head/centers"].shape == (CLASSES, DIM)


@pytest.mark.parametrize("new_format", [True, False])
def test_no_command_in_a_file_is_run(tmp_path: Path, new_format: bool) -> None:
    files = small_files()
    files[0]["state_lr_scheduler"] = Command(f"touch {tmp_path / 'was-run'}")
    write(tmp_path / "in", files)
    torch.save(files[0], tmp_path / "in/checkpoint_gpu_0.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(UsageError, match=r"posix\.system\); no code in a pickle is run"):
        convert(tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "was-run").exists()


def _set(rank: int, **values: Any) -> Callable[[Files], None]:
    return lambda files: files[rank].update(values)


def _weight(rank: int, name: str, value: Tensor | None) -> Callable[[Files], None]:
    def change(files: Files) -> None:
        weights = dict(files[rank]["state_dict_backbone"])
        weights.pop(name, None)
        files[rank]["state_dict_backbone"] = weights | ({} if value is None else {name: value})

    return change


def _rows(rank: int, *shape: int) -> Callable[[Files], None]:
    return _set(rank, state_dict_softmax_fc={"weight": torch.zeros(shape)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files.pop(1), "checkpoint_gpu_1.pt is missing, there are those of ranks up to 2"),
        (lambda files: files.clear(), "holds neither checkpoint_gpu_0.pt nor model.pt"),
        (_rows(1, 5, DIM), r"_1.pt holds 5 centers, expected 4 of 12 over 3 ranks"),
        (_rows(2, 3, 8), r"_2.pt: state_dict_softmax_fc.weight is \[3, 8\], expected \[rows, 16\]"),
        (_set(2, state_dict_softmax_fc={}), "_2.pt: state_dict_softmax_fc.weight is missing"),
        (_set(2, state_dict_softmax_fc=None), "_2.pt: state_dict_softmax_fc is missing, expected a state_dict"),
        (_set(1, global_step=9), "_1.pt is of step 9, .*_0.pt of step 7"),
        (_set(0, global_step=None), "_0.pt: global_step is missing, expected a whole number"),
        (_set(0, state_dict_backbone=Scheduler()), "state_dict_backbone is of type .*Scheduler, .* no code"),
        (_weight(0, "conv1.weight", None), r"iresnet18 with images of 16×16: conv1.weight is missing$"),
        (_weight(0, "bn1.scale", torch.zeros(1)), "bn1.scale is not one of its names$"),
        (_weight(0, "conv1.weight", torch.zeros(64, 1, 3, 3)), r"is \[64, 1, 3, 3\], expected \[64, 3, 3, 3\]$"),
        (_weight(0, "layer4.2.bn1.weight", torch.zeros(1)), "have 2, 2, 2, 3 blocks, .* --backbone NAME"),
        (_weight(0, "fc.weight", None), "has no fc.weight"),
    ],
)
def test_wrong_files_are_told_in_one_line(
    tmp_path: Path, change: Callable[[Files], Any], message: str, source: Path
) -> None:
    files = small_files()
    change(files)
    write(tmp_path / "in", files)
    with pytest.raises(UsageError, match=message) as caught:
        convert(tmp_path / "in", tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "nothing is left behind"


def test_all_differences_are_counted(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"does not fit iresnet34.*layer1\.2\.bn1\.weight is missing \(and \d+ more\)"):
        convert(source / "model.pt", tmp_path / "out", backbone="iresnet34")


def test_what_is_no_source_is_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes((source / "model.pt").read_bytes()[:5000])
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pt")
    (tmp_path / "text.pt").write_text("hello")
    for path, message in (
        (tmp_path / "lost.pt", "no such file"),
        (tmp_path / "model.pt", "is damaged, or not a file that torch.save wrote"),
        (tmp_path / "text.pt", "is damaged, or not a file that torch.save wrote"),
        (tmp_path / "whole.pt", r"its content is of type torch.nn.modules.linear.Linear, expected a state_dict"),
        (source / "checkpoint_gpu_1.pt", "is the checkpoint of one rank: give its folder"),
    ):
        with pytest.raises(UsageError, match=message) as caught:
            convert(path, tmp_path / "out")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()


def test_a_failure_leaves_nothing_behind(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path, *_: Any) -> None:
        (folder / "half").write_text("written")
        raise OSError("no space left")

    monkeypatch.setattr(converting, "save_alone", fail)
    with pytest.raises(OSError, match="no space left"):
        convert(source / "model.pt", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_output_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("keep")
    with pytest.raises(UsageError, match="exists already and is not empty"):
        convert(source / "model.pt", out)
    assert [path.name for path in out.iterdir()] == ["mine"]
    (out / "mine").unlink()
    convert(source / "model.pt", out)  # an empty directory is taken
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
