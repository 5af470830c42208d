"""``pfc convert``, and that its run is one for the other verbs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pfc.engine.backbones import build_backbone
from pfc.launch.cli import main
from tests.launch.test_cli import assert_wrong_use


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model.pt of an IResNet-18, for images of 32×32."""
    network = build_backbone("iresnet18", embedding_dim=8, image_size=(32, 32))
    path = tmp_path_factory.mktemp("common") / "model.pt"
    torch.save(network.state_dict(), path)
    return path


def test_a_converted_backbone_evaluates_and_embeds(
    folder: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = str(tmp_path / "run")
    assert main(["convert", str(model), out]) == 0
    told = capsys.readouterr().out
    assert "iresnet18, embedding_dim 8, images of 32×32" in told
    assert "training cannot go on from it" in told
    assert main(["evaluate", out, "--pairs", str(folder / "pairs.bin")]) == 0
    assert main(["embed", out, str(folder / "set"), str(tmp_path / "embeddings.npy")]) == 0
    assert np.load(tmp_path / "embeddings.npy").shape == (24, 8)
    capsys.readouterr()
    assert_wrong_use(capsys, ["convert", str(model), out], "not empty")


def test_wrong_use_is_told_in_one_line(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "run")
    assert_wrong_use(capsys, ["convert", str(tmp_path / "lost.pt"), out], "lost.pt: no such file")
    assert_wrong_use(capsys, ["convert", str(tmp_path), out], "neither checkpoint_gpu_0.pt nor model.pt")
    assert_wrong_use(capsys, ["convert", str(model), out, "--size", "keep"], "--size keep")
    assert_wrong_use(capsys, ["convert", str(model), out, "--size", "48"], "fc.weight is [8, 2048], expected [8, 4608]")
    assert_wrong_use(capsys, ["convert", str(model), out, "--backbone", "iresnet8"], "no backbone 'iresnet8'")
    assert not Path(out).exists()
