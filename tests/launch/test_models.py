"""What a trained backbone is good for: evaluate, embed, export."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pfc.data import RecordDataset, pack_synthetic
from pfc.engine.backbones.small import SmallNet
from pfc.engine.sub_centers import review, write_dominant
from pfc.launch.cli import main
from tests.commands import pfc


def test_evaluate_as_a_table_and_as_json(folder: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    pairs = str(folder / "pairs.bin")
    assert main(["evaluate", str(run_dir), "--pairs", pairs, "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["set"] == "pairs"
    assert 0 <= result["accuracy"] <= 1
    last = json.loads((run_dir / "evaluation.jsonl").read_text().splitlines()[-1])
    assert result["auc"] == pytest.approx(last["auc"], abs=0.011)  # a last digit may swap two of the 20 pairs

    assert main(["evaluate", str(run_dir), "--pairs", pairs, pairs]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 3
    assert f"{result['auc']:.4f}" in table[1]


def test_two_ranks_evaluate_as_one_does(folder: Path, run_dir: Path):
    options = ["--pairs", str(folder / "pairs.bin"), "--json"]
    alone, shared = (pfc("evaluate", run_dir, *options, *more) for more in ([], ["--nproc", "2"]))
    assert (shared.exit_code, shared.error) == (0, "")
    (expected,), (result,) = json.loads(alone.out), json.loads(shared.out)
    assert min(expected.pop("seconds"), result.pop("seconds")) > 0
    assert result == pytest.approx(expected, abs=1e-5)


def test_wrong_use_that_two_ranks_find_is_reported_once(folder: Path, tmp_path: Path):
    ended = pfc("evaluate", tmp_path / "no run", "--pairs", folder / "pairs.bin", "--nproc", "2")
    assert ended.exit_code == 2
    (line,) = ended.error.splitlines()
    assert line.startswith(f"pfc: {tmp_path / 'no run'}")


def test_embed_a_packed_set(folder: Path, run_dir: Path, tmp_path: Path):
    out = tmp_path / "out.npz"
    assert main(["embed", str(run_dir), str(folder / "set"), str(out)]) == 0
    content = np.load(out)
    assert content["embeddings"].shape == (24, 16)
    assert content["embeddings"].dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(content["embeddings"], axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(content["labels"], RecordDataset.open(folder / "set").labels())

    (checkpoint,) = (run_dir / "checkpoints").glob("step-*")
    assert main(["embed", str(checkpoint), str(folder / "set"), str(tmp_path / "out.npy")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), content["embeddings"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "out.npz"]


def test_centers_and_the_images_far_from_them(folder: Path, run_dir: Path, tmp_path: Path, capsys):
    out, dataset = tmp_path / "centers", RecordDataset.open(folder / "set")
    assert main(["centers", str(run_dir), str(tmp_path / "first"), "--data", str(folder / "set")]) == 0
    angle = json.loads((tmp_path / "first" / "review.json").read_text())["angle_median"]
    assert main(["centers", str(run_dir), str(out), "--angle", str(angle)]) == 0
    told = capsys.readouterr().out
    centers = np.load(out / "centers.npy")
    assert centers.shape == (6, 16)
    np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1, rtol=1e-5)
    assert main(["embed", str(run_dir), str(folder / "set"), str(tmp_path / "out.npz"), "--no-flip"]) == 0
    content = np.load(tmp_path / "out.npz")
    cosines = (content["embeddings"] * centers[content["labels"]]).sum(axis=1)
    far = np.loadtxt(out / "far.txt", dtype=np.int64, ndmin=1)
    np.testing.assert_array_equal(far, np.flatnonzero(np.degrees(np.arccos(cosines)) > angle))
    assert len(far) == 12
    assert f"12 of 24 images lie beyond {angle:g}°" in told
    assert json.loads((out / "review.json").read_text())["images_beyond_angle"] == len(far)
    assert sorted(path.name for path in out.iterdir()) == ["centers.npy", "far.txt", "review.json"]

    clean = ["pack", "recordio", str(folder / "set"), str(tmp_path / "clean"), "--no-shuffle", "--keep-labels"]
    assert main([*clean, "--without-images", str(out / "far.txt")]) == 0
    kept = np.delete(np.arange(24), far)
    packed = RecordDataset.open(tmp_path / "clean")
    np.testing.assert_array_equal(packed.labels(), dataset.labels()[kept])
    for place, number in enumerate(kept.tolist()):
        assert bytes(packed.read(place)[1]) == bytes(dataset.read(number)[1])


@pytest.mark.parametrize("line", ["24", "-1", "one", "1.5"])
def test_a_line_that_is_no_image_is_refused(folder: Path, tmp_path: Path, capsys, line: str):
    (tmp_path / "far.txt").write_text(f"3\n{line}\n")
    command = ["pack", "recordio", str(folder / "set"), str(tmp_path / "clean")]
    assert main([*command, "--without-images", str(tmp_path / "far.txt")]) == 2
    assert "1 line(s) that are no number of an image, 0 to 23: " in capsys.readouterr().err
    assert not (tmp_path / "clean").exists()


def test_images_that_cannot_be_read_are_left_out(run_dir: Path, folder: Path, tmp_path: Path, capsys):
    shutil.copytree(folder / "set", tmp_path / "set")
    dataset = RecordDataset.open(tmp_path / "set")
    (rec,) = (tmp_path / "set").glob("*.rec")
    content = bytearray(rec.read_bytes())
    for number, size in ((3, 16), (7, 16)):
        at = content.index(bytes(dataset.read(number)[1]))
        content[at : at + size] = bytes(size)  # an image without its header
    place = content.index(bytes(dataset.read(11)[1])) - 32  # its record's magic number
    content[place : place + 4] = bytes(4)
    rec.write_bytes(content)
    assert main(["centers", str(run_dir), str(tmp_path / "out"), "--data", str(tmp_path / "set")]) == 0
    told = capsys.readouterr().err
    for number in (3, 7, 11):
        assert f"image {number} is left out: " in told
    summary = json.loads((tmp_path / "out" / "review.json").read_text())
    assert (summary["images"], summary["unreadable_images"]) == (21, 3)


def test_centers_of_another_set_are_refused(run_dir: Path, folder: Path, tmp_path: Path, capsys):
    pack_synthetic(tmp_path / "other", identities=5, images_per_identity=2, size=32, workers=1)
    assert main(["centers", str(run_dir), str(tmp_path / "out"), "--data", str(tmp_path / "other")]) == 2
    assert "has 6 identities" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert main(["centers", str(run_dir), str(tmp_path / "out")]) == 2
    assert "exists already" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out"]


def test_of_several_centers_the_one_with_most_images_is_kept(tmp_path: Path):
    centers = np.zeros((3, 2, 4), dtype=np.float32)
    centers[:, 0, 0], centers[:, 1, 1] = 2.0, 3.0  # the directions of the first and the second axis
    axes = torch.eye(4)
    labels = np.array([0, 0, 0, 1, 1, 2])
    embeddings = axes[[1, 1, 0, 0, 0, 2]] + 0.01 * axes[[0, 0, 1, 1, 1, 0]]
    numbers = np.array([0, 1, 2, 4, 5, 6])  # the fourth image is one that cannot be read
    batches = iter([(numbers[:4], labels[:4], embeddings[:4]), (numbers[4:], labels[4:], embeddings[4:])])
    found = review(centers, batches, images=7)
    assert found.counts.tolist() == [[1, 2], [2, 0], [1, 0]]
    assert found.dominant.tolist() == [1, 0, 0]
    assert found.far(75).tolist() == [2, 6]
    summary = found.summary(75)
    assert summary["images_at_the_dominant"] == 5
    assert summary["unreadable_images"] == 1
    assert summary["empty_sub_centers"] == 2
    assert summary["identities_in_several"] == 1
    write_dominant(centers, found.dominant, tmp_path / "centers.npy", lambda *_: None)
    assert np.load(tmp_path / "centers.npy").tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]]


def test_embed_a_folder_leaves_unreadable_files_out(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    images = tmp_path / "images"
    (images / "deep").mkdir(parents=True)
    for name in ("b.png", "deep/a.JPG"):
        Image.new("RGB", (40, 30), (200, 10, 10)).save(images / name)
    (images / "broken.png").write_bytes(b"not an image")
    (images / "notes.txt").write_text("none")
    assert main(["embed", str(run_dir), str(images), str(tmp_path / "out.npz")]) == 0
    content = np.load(tmp_path / "out.npz")
    assert content["names"].tolist() == ["b.png", "deep/a.JPG"]
    assert content["embeddings"].shape == (2, 16)
    error = capsys.readouterr().err
    assert "broken.png: unreadable" in error
    assert "1 of 3 files left out" in error


@pytest.mark.parametrize("name", ["out.txt", "there.npz"])
def test_embed_refuses_names_before_it_works(run_dir: Path, tmp_path: Path, capsys, name: str):
    (tmp_path / "there.npz").write_text("precious")
    assert main(["embed", str(run_dir), str(tmp_path), str(tmp_path / name)]) == 2
    assert name in capsys.readouterr().err
    assert (tmp_path / "there.npz").read_text() == "precious"


def test_embed_a_folder_without_images(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["embed", str(run_dir), str(tmp_path), str(tmp_path / "out.npz")]) == 2
    assert "no readable image" in capsys.readouterr().err


def test_exported_weights_are_the_networks(run_dir: Path, tmp_path: Path):
    from safetensors.torch import load_file

    from pfc.engine.checkpoint import load_backbone

    out = tmp_path / "model.safetensors"
    assert main(["export", str(run_dir), str(out)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert out.stat().st_mode & 0o777 == 0o644
    weights, state = load_file(out), load_backbone(run_dir)[0].state_dict()
    assert weights.keys() == state.keys()
    assert all(weights[name].equal(value) for name, value in state.items())


def test_devices_that_are_not_there(folder: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]):
    for device in ("cuda:99", "gpu"):
        line = ["evaluate", str(run_dir), "--pairs", str(folder / "pairs.bin"), "--device", device]
        assert main(line) == 2
        assert device in capsys.readouterr().err


def test_a_bf16_run_is_evaluated_and_embedded_in_bf16(
    folder: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    half = tmp_path / "half"
    shutil.copytree(run_dir, half, symlinks=True)
    for path in (half / "config.yaml", next((half / "checkpoints").glob("step-*")) / "config.yaml"):
        path.write_text(path.read_text().replace("precision: float32", "precision: bf16"))
    used: set[tuple[bool, torch.dtype]] = set()
    forward = SmallNet.forward

    def watched(self: SmallNet, images: torch.Tensor) -> torch.Tensor:
        used.add((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))
        return forward(self, images)

    monkeypatch.setattr(SmallNet, "forward", watched)
    assert main(["evaluate", str(half), "--pairs", str(folder / "pairs.bin"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["precision"] == "bf16"
    assert main(["evaluate", str(half), "--pairs", str(folder / "pairs.bin")]) == 0
    assert capsys.readouterr().out.endswith("computed in bf16, as in its run\n")
    assert main(["embed", str(half), str(folder / "set"), str(tmp_path / "out.npy")]) == 0
    assert used == {(True, torch.bfloat16)}


def test_a_run_of_a_module_beside_its_configuration(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    for one in (project, elsewhere):
        one.mkdir()
    (project / "own_net.py").write_text(
        "from torch import nn\n"
        "def net(embedding_dim, image_size, bias: bool = True):\n"
        "    features = 3 * image_size[0] * image_size[1]\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(features, embedding_dim, bias=bias))\n"
    )
    (project / "own.yaml").write_text(
        f"run: {{name: own, dir: {tmp_path / 'runs'}}}\ndata: {{train: {folder / 'set'}, batch_size: 4}}\n"
        "backbone: {name: 'own_net:net', embedding_dim: 8, options: {bias: false}}\nschedule: {steps: 2}\n"
        "log: {tensorboard: false}\n"
    )
    trained = pfc("train", project / "own.yaml", "--nproc", "2", folder=elsewhere)
    assert (trained.exit_code, trained.error) == (0, "")
    pairs = ("--pairs", folder / "pairs.bin")
    again = pfc("train", project / "own.yaml", "schedule.steps=3", "--nproc", "1", folder=elsewhere)
    assert (again.exit_code, again.error) == (0, "")
    lost = pfc("evaluate", tmp_path / "runs" / "own", *pairs, folder=project)
    assert lost.exit_code == 2
    assert lost.error == (
        "pfc: backbone.name: no module own_net on the Python path: set PYTHONPATH to the folder that it is in\n"
    )
    monkeypatch.syspath_prepend(project)
    assert main(["evaluate", str(tmp_path / "runs" / "own"), "--pairs", str(folder / "pairs.bin")]) == 0
    sys.modules.pop("own_net")


@pytest.mark.parametrize("name", ["own_net", "runs.own.own_net", "runs.own.checkpoints.own_net"])
@pytest.mark.parametrize("at", ["", "runs/own", "runs/own/checkpoints"])
def test_no_code_that_comes_with_a_checkpoint_is_run(
    run_dir: Path,
    folder: Path,
    tmp_path: Path,
    name: str,
    at: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    """A stranger's run, whose configuration names a module that lies in it; also where the Python path leads there."""
    run = tmp_path / "runs" / "own"
    shutil.copytree(run_dir, run)
    for place in (run, run / "checkpoints"):
        (place / "own_net.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    config = (checkpoint / "config.yaml").read_text()
    (checkpoint / "config.yaml").write_text(config.replace("name: small", f"name: {name}:net"))
    here = tmp_path / at
    source = str(checkpoint.relative_to(here))
    monkeypatch.chdir(here)
    for on_path in (False, True):
        if on_path:
            monkeypatch.syspath_prepend(here)
        assert main(["evaluate", source, "--pairs", str(folder / "pairs.bin")]) == 2
        assert not (tmp_path / "ran").exists()
    if (here / name.replace(".", "/")).with_suffix(".py").exists():
        assert "comes with the checkpoint, and no code in one is run" in capsys.readouterr().err
    for package in ("runs", "runs.own", "runs.own.checkpoints"):
        sys.modules.pop(package, None)
