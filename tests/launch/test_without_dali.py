"""Where NVIDIA DALI is not installed: what decodes says so in one line, everything else works."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from pfc.data.loading.dali import how_to_install
from tests.commands import Command, Ended, run_pfc
from tests.launch.test_train import write_config

TOLD = "NVIDIA DALI, which decodes images, is not installed: pip install 'pfc[cuda13]'"


def pfc(*arguments: str | Path, **options: Any) -> Ended:
    return Command(run_without_dali, [str(argument) for argument in arguments], **options).wait()


def run_without_dali(arguments: Sequence[str]) -> int:
    """In the process of the command."""
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        del sys.modules[name]
    sys.modules["nvidia.dali"] = None  # type: ignore[assignment]  # importing it fails, as if it were not there
    return run_pfc(arguments)


def assert_told(ended: Ended) -> None:
    assert (ended.exit_code, ended.error) == (2, f"pfc: {TOLD}\n")


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_training_says_what_to_install(folder: Path, tmp_path: Path, ranks: str) -> None:
    config = write_config(folder, tmp_path, steps=2)
    assert_told(pfc("train", config, "evaluation.pairs=[]", "--nproc", ranks))
    assert not list(tmp_path.glob("runs/*/checkpoints/step-*"))


def test_evaluating_and_embedding_say_what_to_install(run_dir: Path, folder: Path, tmp_path: Path) -> None:
    assert_told(pfc("evaluate", run_dir, "--pairs", folder / "pairs.bin"))
    assert_told(pfc("embed", run_dir, folder / "set", tmp_path / "out.npz"))
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_decode_works(run_dir: Path, tmp_path: Path) -> None:
    assert pfc("--help").exit_code == 0
    size = ("--identities", "2", "--images-per-identity", "2", "--size", "16")
    assert pfc("pack", "synthetic", tmp_path / "set", *size).exit_code == 0
    assert '"images": 4' in pfc("inspect", tmp_path / "set", "--json").out
    assert pfc("export", run_dir, tmp_path / "out.safetensors").exit_code == 0
    generated = write_config(tmp_path, tmp_path, steps=2)
    data = "data.train={generated: 40, image_size: [32, 32]}"
    ended = pfc("train", generated, data, "evaluation.pairs=[]", "--nproc", "1")
    assert (ended.exit_code, ended.error) == (0, "")


@pytest.mark.parametrize(("cuda", "extra"), [("12.6", "cuda12"), ("13.0", "cuda13"), (None, "cuda13")])
def test_the_extra_is_that_of_torch(cuda: str | None, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert how_to_install() == f"pip install 'pfc[{extra}]'"
