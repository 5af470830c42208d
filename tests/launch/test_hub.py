"""``pfc export RUN FOLDER``: what the Hugging Face Hub takes, loaded from that folder; nothing is downloaded."""

import io
import json
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pfc.engine
from pfc.data import RecordDataset, UsageError, decode_images
from pfc.engine.checkpoint import load_backbone
from pfc.launch.cli import main
from tests.commands import Command, run_code

hub = pytest.importorskip("huggingface_hub")
from pfc.engine.sharing.hub import EmbeddingNetwork  # noqa: E402

OWN = (
    "from torch import nn\n"
    "def net(embedding_dim, image_size, bias: bool = True):\n"
    "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size[0] * image_size[1], embedding_dim, bias=bias))\n"
)


@pytest.fixture(scope="module")
def shared(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run without ONNX, as a folder of the Hub."""
    out = tmp_path_factory.mktemp("shared") / "tiny-v1.5"
    assert main(["export", str(run_dir), str(out), "--no-onnx"]) == 0
    return out


@pytest.fixture
def images(folder: Path) -> list[np.ndarray]:
    """Encoded images of the set."""
    dataset = RecordDataset.open(folder / "set")
    return [dataset.read(number)[1] for number in range(4)]


def run_of(kind: str, run_dir: Path, tmp_path: Path, options: str = "{bias: false}") -> Path:
    """A run that was trained with another backbone, made of its weights at random."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    from pfc.engine.build import input_size, new_network
    from pfc.engine.checkpoint import network_tensors
    from pfc.engine.config import load_config

    run = tmp_path / "other"
    shutil.copytree(run_dir, run, symlinks=True)
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    path = checkpoint / "config.yaml"
    text = path.read_text().replace("name: small", f"name: {kind}").replace("options: {}", f"options: {options}")
    path.write_text(re.sub(r"\n  code: .*", "\n  code: null", text))
    config = load_config(path)
    for old in (*checkpoint.glob("*.distcp"), checkpoint / ".metadata"):
        old.unlink()
    torch.manual_seed(3)
    network = new_network(config, input_size(config))
    save(network_tensors(network), storage_writer=FileSystemWriter(checkpoint), no_dist=True)
    return run


def test_the_network_comes_back_as_pfc_embed_computes_it(
    folder: Path, run_dir: Path, shared: Path, tmp_path: Path, images: list[np.ndarray]
):
    assert sorted(path.name for path in shared.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    network = EmbeddingNetwork.from_pretrained(shared)
    assert not any(module.training for module in network.modules())
    assert main(["embed", str(run_dir), str(folder / "set"), str(tmp_path / "all.npy")]) == 0
    given = network.preprocess([Image.open(io.BytesIO(image)) for image in images])
    with torch.inference_mode():
        found = network(given)
        single = EmbeddingNetwork.from_pretrained(str(shared), flip=False)(given)
        raw = load_backbone(run_dir)[0](given)
    np.testing.assert_allclose(found.numpy(), np.load(tmp_path / "all.npy")[:4], atol=1e-5)
    torch.testing.assert_close(network.backbone(given).detach(), raw, rtol=0, atol=1e-6)
    torch.testing.assert_close(single, raw / raw.norm(dim=1, keepdim=True))
    assert (found - single).abs().max() > 1e-3  # the mirror image counts


def test_others_may_read_what_is_shared(shared: Path):
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in shared.iterdir())


def test_images_are_prepared_as_the_evaluation_does(shared: Path, images: list[np.ndarray]):
    network = EmbeddingNetwork.from_pretrained(shared)
    pictures = [Image.open(io.BytesIO(image)) for image in images]
    (expected,) = decode_images(images, image_size=(32, 32), batch_size=4)
    torch.testing.assert_close(network.preprocess(pictures), expected, rtol=0, atol=1e-6)
    arrays = [np.asarray(picture.convert("RGB")) for picture in pictures]
    assert torch.equal(network.preprocess(arrays), network.preprocess(pictures))
    assert network.preprocess(arrays[0]).shape == (1, 3, 32, 32)
    wide = Image.fromarray(arrays[0]).resize((90, 60), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    wide.save(file, "PNG")
    (expected,) = decode_images([file.getvalue()], image_size=(32, 32), batch_size=1)
    assert (network.preprocess(wide) - expected).abs().mean() < 0.02
    with pytest.raises(ValueError, match="give uint8"):
        network.preprocess(arrays[0].astype(np.float32))
    told = json.loads((shared / "config.json").read_text())
    assert told["backbone"] == {"name": "small", "embedding_dim": 16, "options": {}}
    assert told["preprocessing"]["size"] == {"height": 32, "width": 32}
    assert told["flip"] is True


def test_the_card_says_what_the_run_knows(folder: Path, run_dir: Path, tmp_path: Path, capsys):
    threshold = tmp_path / "threshold.json"
    capsys.readouterr()
    assert main(["threshold", str(run_dir), "--on", str(folder / "pairs.bin"), "--fmr", "0.3", "--json"]) == 0
    threshold.write_text(capsys.readouterr().out)
    line = ["export", str(run_dir), str(tmp_path / "tiny"), "--license", "apache-2.0", "--threshold", str(threshold)]
    assert main(line) == 0
    card = hub.ModelCard.load(tmp_path / "tiny" / "README.md")
    assert (card.data.license, card.data.library_name) == ("apache-2.0", "pfc")
    last = json.loads((run_dir / "evaluation.jsonl").read_text().splitlines()[-1])
    results = {(one.dataset_name, one.metric_type): one.metric_value for one in card.data.eval_results}
    assert results["pairs", "accuracy"] == last["accuracy"]
    assert results["pairs", "eer"] == last["eer"]
    for told in (
        "`set`: 24 images of 6 identities",
        "| checkpoint | `step-00000002` |",
        "| objective | `d_softmax` (",
        "| sample rate | 1 |",
        "| steps | 2 of a schedule of 2 steps |",
        "| batch | 4 images, on 1 rank(s) |",
        f"| pairs | 2 | accuracy | {last['accuracy']:.4f} ± {last['accuracy_std']:.4f} |",
        f"{json.loads(threshold.read_text())['threshold']:.4f} or more are taken for one identity",
        "Licence: apache-2.0.",
        "EmbeddingNetwork.from_pretrained(",
        "onnxruntime.InferenceSession(",
    ):
        assert told in card.content, told
    places = [folder, tmp_path, Path(pfc.engine.__file__).parents[1], Path(torch.__file__).parents[1]]
    for path in (tmp_path / "tiny").iterdir():
        assert not any(str(place).encode() in path.read_bytes() for place in places), path
    for name in ("README.md", "config.json"):
        assert re.search(rf"\b{re.escape(socket.gethostname())}\b", (tmp_path / "tiny" / name).read_text()) is None


def test_the_code_of_the_card_runs(folder: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("onnxruntime")
    out = tmp_path / "tiny"
    assert main(["export", str(run_dir), str(out), "--int8"]) == 0
    text = (out / "README.md").read_text()
    assert "None was chosen for a false match rate" in text
    assert "Licence: not stated" in text
    dataset = RecordDataset.open(folder / "set")
    monkeypatch.chdir(out)
    for name, number in (("a.jpg", 0), ("b.jpg", 20)):
        Path(name).write_bytes(bytes(dataset.read(number)[1]))
    torch_code, onnx_code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    by_torch: dict = {}
    exec(torch_code.replace("FOLDER_OR_REPOSITORY", str(out)), by_torch)
    by_onnx: dict = {}
    exec(onnx_code, by_onnx)
    assert float(by_onnx["a"][0] @ by_torch["a"].detach().numpy()) > 0.99
    assert abs(float(by_torch["a"] @ by_torch["b"])) < 0.99999


def test_a_run_that_knows_little(run_dir: Path, tmp_path: Path):
    run = tmp_path / "run"
    shutil.copytree(run_dir, run, symlinks=True)
    (run / "evaluation.jsonl").unlink()
    (checkpoint,) = (run / "checkpoints").glob("step-*")
    path = checkpoint / "config.yaml"
    path.write_text(re.sub(r"train: .*/set", f"train: {tmp_path}/elsewhere/faces", path.read_text()))
    state = json.loads((checkpoint / "state.json").read_text())
    state.pop("evaluation", None)
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert main(["export", str(run), str(tmp_path / "out"), "--no-onnx"]) == 0
    card = hub.ModelCard.load(tmp_path / "out" / "README.md")
    assert "`faces`: an unknown number of images" in card.content
    assert "This checkpoint was not evaluated." in card.content
    assert card.data.eval_results is None
    assert card.data.license is None
    assert "onnxruntime" not in card.content
    assert str(tmp_path) not in card.content


def test_what_is_pushed_is_what_was_exported(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sent: dict[str, bytes] = {}

    def upload(self: object, *, folder_path: Path, **_: object) -> str:
        sent.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
        return "sent"

    class Repository:
        repo_id = "me/tiny"

    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    monkeypatch.setattr(hub.HfApi, "create_repo", lambda *_, **__: Repository)
    EmbeddingNetwork.from_pretrained(shared).push_to_hub("me/tiny")
    assert sent == {path.name: path.read_bytes() for path in shared.iterdir()}


@pytest.mark.parametrize("linked", [False, True])  # as the files in the Hub's cache are
@pytest.mark.parametrize("at", ["", "shared"])
def test_no_code_beside_the_weights_is_run(
    run_dir: Path,
    tmp_path: Path,
    at: str,
    linked: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    code = tmp_path / "code"
    code.mkdir()
    (code / "hub_net.py").write_text(OWN)
    monkeypatch.syspath_prepend(code)
    run, out = run_of("hub_net:net", run_dir, tmp_path), tmp_path / "shared"
    assert main(["export", str(run), str(out), "--no-onnx"]) == 0
    assert "the module `hub_net` must be on the Python path" in (out / "README.md").read_text()
    given = torch.rand(2, 3, 32, 32)
    found = EmbeddingNetwork.from_pretrained(out).backbone(given)
    torch.testing.assert_close(found, load_backbone(run)[0](given))

    sys.modules.pop("hub_net")
    monkeypatch.undo()
    place = tmp_path / "blob" if linked else out / "hub_net.py"
    place.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    if linked:
        (out / "hub_net.py").symlink_to(place)
    monkeypatch.chdir(tmp_path / at)
    for on_path in (False, True):
        if on_path:
            monkeypatch.syspath_prepend(out)
        with pytest.raises(
            UsageError, match="comes with the checkpoint" if on_path else "no module hub_net|comes with"
        ):
            EmbeddingNetwork.from_pretrained(out)
    assert not (tmp_path / "ran").exists()


def test_timm_networks_come_back(run_dir: Path, tmp_path: Path):
    pytest.importorskip("timm")
    run = run_of("timm/resnet10t", run_dir, tmp_path, "{norm: layer}")
    assert main(["export", str(run), str(tmp_path / "out"), "--no-onnx"]) == 0
    given = torch.rand(2, 3, 32, 32)
    network = EmbeddingNetwork.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(network.backbone(given), load_backbone(run)[0](given))


def test_folders_that_are_no_network(shared: Path, tmp_path: Path):
    for spoilt, told in (
        ("config.json", "no config.json of pfc"),
        ("model.safetensors", "model.safetensors is missing"),
    ):
        out = tmp_path / spoilt
        shutil.copytree(shared, out)
        (out / spoilt).unlink()
        with pytest.raises(UsageError, match=told):
            EmbeddingNetwork.from_pretrained(out)
    (tmp_path / "model.safetensors" / "config.json").write_text('{"backbone": {"name": "small"}}')
    with pytest.raises(UsageError, match="of pfc there"):
        EmbeddingNetwork.from_pretrained(tmp_path / "model.safetensors")
    out = tmp_path / "mixed"
    shutil.copytree(shared, out)
    config = json.loads((out / "config.json").read_text())
    config["backbone"]["embedding_dim"] = 17
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="does not hold this network"):
        EmbeddingNetwork.from_pretrained(out)
    (out / "config.json").write_text((shared / "config.json").read_text())
    (out / "model.safetensors").write_bytes((shared / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(UsageError, match="does not hold this network"):
        EmbeddingNetwork.from_pretrained(out)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["out.pt"], "must end in .onnx or .safetensors"),
        (["there"], "exists already"),
        (["out", "--license", "Apache 2"], "write it as the Hub calls it"),
        (["out", "--no-onnx", "--threshold", "there/precious"], "give what pfc threshold --json has printed"),
        (["out.onnx", "--license", "mit"], "are for a folder"),
        (["out", "--no-onnx", "--images", "there"], "leave --no-onnx out"),
    ],
)
def test_wrong_use(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, line: list[str], told: str):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("precious")
    assert main(["export", str(run_dir), *line]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert told in error
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_without_the_extra_one_line_says_so(run_dir: Path, tmp_path: Path):
    code = (
        "import sys; sys.modules['huggingface_hub'] = None; from pfc.launch.cli import main; "
        f"code = main(['export', {str(run_dir)!r}, {str(tmp_path / 'out')!r}])\n"
        "try:\n    import pfc.engine.sharing.hub\nexcept ImportError as error:\n    print(error)\n"
        "sys.exit(code)"
    )
    ended = Command(run_code, code).wait()
    advice = "pfc.engine.sharing.hub needs huggingface_hub: pip install 'pfc[hub]'\n"
    assert (ended.exit_code, ended.out, ended.error) == (2, advice, f"pfc: {advice}")
    assert list(tmp_path.iterdir()) == []


def test_nothing_else_imports_huggingface_hub():
    """Nor does anything that tests have imported beforehand."""
    code = (
        "import sys, pfc.engine.trainer, pfc.launch.verbs.export; from pfc.launch.cli import main; "
        "main(['--help']); sys.exit('huggingface_hub' in sys.modules)"
    )
    assert Command(run_code, code).wait().exit_code == 0
