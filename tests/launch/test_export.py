"""``pfc export`` to ONNX: the same network for others, and how near it comes measured as they will run it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from pfc.data import decode_images, read_pairs
from pfc.engine.backbones import build_backbone
from pfc.engine.backbones.recompute import recompute
from pfc.engine.checkpoint import load_backbone
from pfc.launch.cli import main
from tests.commands import pfc

onnxruntime = pytest.importorskip("onnxruntime")
from pfc.engine.sharing import onnx_file  # noqa: E402

TYPES = {"--fp16": 10, "--int8": 2}  # onnx.TensorProto.FLOAT16 and UINT8


def run_onnx(path: Path, images: Tensor, batch: int) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = [session.run(["embeddings"], {"images": part.numpy()})[0] for part in images.split(batch)]
    assert all(one.dtype == np.float32 for one in found)
    return torch.from_numpy(np.concatenate(found)).double()


def told_cosines(out: str) -> tuple[float, float]:
    found = re.search(r"mean (-?[\d.]+), minimum (-?[\d.]+)\n", out)
    assert found is not None
    return float(found[1]), float(found[2])


@pytest.fixture(scope="module")
def averaged(folder: Path) -> Path:
    """A run that keeps an average of its weights, far from the weights themselves."""
    text = (
        f"run: {{name: averaged, dir: {folder}/runs}}\ndata: {{train: {folder}/set, batch_size: 4}}\n"
        "backbone: {name: small, embedding_dim: 16, ema: 0.9}\noptimizer: {backbone: {lr: 1.0}}\n"
        "schedule: {steps: 4, name: constant}\nlog: {tensorboard: false}\n"
    )
    (folder / "averaged.yaml").write_text(text, encoding="utf-8")
    assert pfc("train", folder / "averaged.yaml", "--nproc", "1").exit_code == 0
    return folder / "runs" / "averaged"


@pytest.mark.parametrize("option", ["", "--fp16", "--int8"])
def test_the_cosines_told_are_those_of_onnx_runtime(folder: Path, run_dir: Path, tmp_path: Path, capsys, option: str):
    out = tmp_path / "model.onnx"
    assert main(["export", str(run_dir), str(out), *([option] if option else [])]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    told = capsys.readouterr().out
    encoded = read_pairs(folder / "pairs.bin").images
    assert f"over {len(encoded)} images of pairs\n" in told
    (images,) = decode_images(encoded, image_size=(32, 32), batch_size=len(encoded))
    model, _ = load_backbone(run_dir)
    with torch.inference_mode():
        expected = normalize(model(images).double())
    every = torch.cat([(normalize(run_onnx(out, images, batch)) * expected).sum(dim=1) for batch in (1, 3, 8)])
    assert told_cosines(told) == pytest.approx((every.mean().item(), every.min().item()), abs=2e-6)
    if not option:
        assert told_cosines(told) == (1.0, 1.0)
        torch.testing.assert_close(run_onnx(out, images, 5).float(), model(images).detach(), rtol=1e-3, atol=1e-4)
    else:
        import onnx

        assert {"--fp16": 0.9999, "--int8": 0.99}[option] < told_cosines(told)[1]
        assert (1 - every).max() > {"--fp16": 1e-9, "--int8": 1e-6}[option]  # it is that network
        matrices = [one for one in onnx.load(out).graph.initializer if np.prod(one.dims) > max(one.dims, default=1)]
        assert {one.data_type for one in matrices} == {TYPES[option]}
    about = onnxruntime.InferenceSession(str(out)).get_modelmeta().custom_metadata_map
    size = json.loads(about["preprocessing"])
    assert size["size"] == {"height": 32, "width": 32}
    assert (size["mean"], size["std"], size["channel_order"]) == ([0.5] * 3, [0.5] * 3, "RGB")
    assert about["precision"] == {"": "float32", "--fp16": "float16", "--int8": "int8"}[option]
    assert (about["backbone"], about["embedding_dim"]) == ("small", "16")


def test_the_average_of_the_weights_is_exported(averaged: Path, tmp_path: Path, capsys):
    assert main(["export", str(averaged), str(tmp_path / "model.onnx")]) == 0
    assert "over 96 random images, as none of the run's evaluation sets can be read here" in capsys.readouterr().out
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model, config = load_backbone(averaged)
    (checkpoint,) = (averaged / "checkpoints").glob("step-*")
    plain = shutil.copytree(checkpoint, tmp_path / checkpoint.name)
    (plain / "config.yaml").write_text((plain / "config.yaml").read_text().replace("ema: 0.9", "ema: null"))
    assert config.backbone.ema == 0.9
    found = run_onnx(tmp_path / "model.onnx", images, 4).float()
    torch.testing.assert_close(found, model(images).detach(), rtol=1e-3, atol=1e-3)  # of 300 batches at most 4e-4
    assert not torch.allclose(found, load_backbone(plain)[0](images), rtol=1e-2, atol=1e-2)


def test_images_of_ones_own_to_measure_on(
    folder: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (40, 30), (80 * number, 10, 10)).save(photos / f"{number}.png")
    (photos / "broken.jpg").write_bytes(b"none")
    for images, told in ((photos, "over 3 images of photos"), (folder / "set", "over 24 images of set")):
        out = tmp_path / f"{images.name}.onnx"
        assert main(["export", str(run_dir), str(out), "--images", str(images)]) == 0
        assert told in capsys.readouterr().out
        # The second time the same file is measured.
        monkeypatch.setattr(onnx_file, "write_onnx", lambda _, path, *__, made=out: shutil.copy(made, path))


def test_a_file_that_differs_is_not_kept(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    write = onnx_file.write_onnx

    def spoil(network: nn.Module, *arguments: object) -> None:
        weight = next(network.parameters())
        kept, weight.data = weight.data, spoilt(weight.data)
        write(network, *arguments)  # type: ignore[arg-type]
        weight.data = kept

    spoilt: Callable[[Tensor], Tensor] = lambda weight: weight * 1.1  # noqa: E731
    monkeypatch.setattr(onnx_file, "write_onnx", spoil)
    with pytest.raises(RuntimeError, match="differs"):
        main(["export", str(run_dir), str(tmp_path / "model.onnx")])
    assert list(tmp_path.iterdir()) == []
    spoilt = lambda weight: weight * torch.inf  # noqa: E731
    assert main(["export", str(run_dir), str(tmp_path / "model.onnx"), "--fp16"]) == 2
    assert "not finite" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "told"),
    [(["a.onnx", "--fp16", "--int8"], "--fp16 and --int8"), (["a.safetensors", "--int8"], "are for ONNX")],
)
def test_options_that_do_not_fit(run_dir: Path, tmp_path: Path, capsys, line: list[str], told: str):
    assert main(["export", str(run_dir), str(tmp_path / line[0]), *line[1:]]) == 2
    assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "precision"), [("vit_t", {"patch": 16}, "int8"), ("iresnet18", {}, "float16")]
)
def test_transformers_and_residual_networks(tmp_path: Path, name: str, options: dict[str, int], precision: str):
    torch.manual_seed(0)
    network = build_backbone(name, embedding_dim=16, image_size=(32, 32), **options)
    recompute(network)
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, 3, 32, 32) * 2 - 1)
    network.eval()
    onnx_file.write_onnx(network, tmp_path / "model.onnx", (32, 32), precision, {})  # type: ignore[arg-type]
    images = torch.rand(9, 3, 32, 32) * 2 - 1
    found = onnx_file.agreement(network, tmp_path / "model.onnx", images)
    assert 0.98 < found.least <= found.mean
    assert found.mean < 1 - 1e-8
    assert (tmp_path / "model.onnx").stat().st_size < 1.2 * sum(
        value.numel() * {"int8": 1, "float16": 2}[precision] for value in network.state_dict().values()
    )
