"""`pfc bench step`: a whole training step, on made-up batches or with the data."""

import json
from pathlib import Path
from typing import Any

import pytest

from pfc.data import pack_synthetic
from pfc.launch.cli import main

SMALL = ["--classes", "300", "--dim", "16", "--batch", "8", "--steps", "2", "--warmup", "1", "--rounds", "1"]


STEP = """
data: {{train: {train}, batch_size: 4{size}}}
backbone: {{name: small, embedding_dim: 16, options: {{width: 8}}}}
head: {{sample_rate: 0.5{classes}}}
optimizer: {{accumulate: 2}}
schedule: {{steps: 5}}
"""


@pytest.mark.usefixtures("forked")
def test_step_on_made_up_batches(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, file = tmp_path / "run.yaml", tmp_path / "step.json"
    size, classes = ", image_size: [16, 16]", ", num_classes: 50"
    config.write_text(STEP.format(train=tmp_path / "nowhere", size=size, classes=classes))
    options = ["--nproc", "2", "--steps", "2", "--warmup", "1", "--json", str(file), "head.num_classes=70"]
    assert main(["bench", "step", str(config), *options]) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    assert "70 classes at rate 0.5, 16 images a step" in captured.out
    assert all(len(line) <= 120 for line in captured.out.splitlines())
    found = json.loads(file.read_text())
    assert [line["head"] for line in found["lines"]] == ["pfc", "dense"]
    for line in found["lines"]:
        assert line["images_per_second"] == pytest.approx(16 / line["median_s"])
        assert sum(line["phases"].values()) == pytest.approx(1)
        assert min(share for name, share in line["phases"].items() if name != "data") > 0
        assert line["head_alone_s"] > 0
        assert line["peak_bytes"] > 0


def test_step_with_the_data_set(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config, file = tmp_path / "run.yaml", tmp_path / "step.json"
    pack_synthetic(tmp_path / "set", identities=6, images_per_identity=4, size=32, workers=1)
    config.write_text(STEP.format(train=tmp_path / "set", size="", classes=""))
    options = ["--nproc", "1", "--steps", "1", "--warmup", "1", "--no-dense", "--data", "--json", str(file)]
    assert main(["bench", "step", str(config), *options]) == 0
    assert capfd.readouterr().err == ""  # not the profiler's lines
    found: dict[str, Any] = json.loads(file.read_text())
    assert found["config"]["head"]["num_classes"] == 6
    assert found["lines"][0]["phases"]["data"] > 0


@pytest.mark.parametrize(
    ("size", "options", "message"),
    [
        ("", [], "without it, give head.num_classes and data.image_size"),
        (", image_size: [16, 16]", ["head.sample_rate=2"], "head.sample_rate: found 2"),
        (", image_size: [16, 16]", ["backbone.options.depth=3"], "depth"),
    ],
)
@pytest.mark.usefixtures("forked")
def test_wrong_use_of_step(
    size: str, options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(STEP.format(train=tmp_path / "nowhere", size=size, classes=", num_classes: 50"))
    assert main(["bench", "step", str(config), "--nproc", "1", *options]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert len(told.splitlines()) == 1
