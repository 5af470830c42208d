"""Runs on a generated data set: they learn, resume, say what they train on, and refuse what needs files."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pfc.data import UsageError
from pfc.engine.config import Config, parse_config
from pfc.engine.log.telemetry import read_json_lines
from tests.commands import pfc
from tests.engine.runs import configuration, train

GENERATED = {"generated": 2000, "active": 20, "images_per_identity": 10, "image_size": [16, 16]}


def generated(runs: Path, data: dict[str, Any] | None = None, **sections: Any) -> Config:
    data = {"train": GENERATED, "batch_size": 20} | (data or {})
    return configuration(Path("nowhere"), runs, data=data, **sections)


def test_a_network_learns_to_tell_them_apart(tmp_path: Path) -> None:
    config = generated(
        tmp_path,
        head={"sample_rate": 0.1},
        optimizer={"backbone": {"name": "adamw", "lr": 0.005}, "head": {"name": "row_adagrad", "lr": 0.1}},
        schedule={"steps": 40, "name": "constant"},
    )
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    done = pfc("train", tmp_path / "config.yaml", "--nproc", "1")
    assert done.exit_code == 0, done.error
    assert "data       generated: 200 images of 20 of 2,000 identities, computed when they are needed" in done.out
    losses = [line["loss"] for line in read_json_lines(config.run.path / "metrics.jsonl")]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    report = (config.run.path / "report.html").read_text()
    assert "<b>200</b><span>training images" in report
    assert yaml.safe_load((config.run.path / "config.yaml").read_text())["data"]["image_size"] == [16, 16]


def test_a_run_goes_on_with_the_images_that_follow(tmp_path: Path) -> None:
    lines = train(2, generated(tmp_path / "straight", schedule={"steps": 12}))
    train(2, generated(tmp_path / "same", schedule={"steps": 12}), steps=7)
    assert [line["loss"] for line in train(2, generated(tmp_path / "same", schedule={"steps": 12}))] == [
        line["loss"] for line in lines
    ]
    train(2, generated(tmp_path / "moved", schedule={"steps": 12}), steps=7)  # 280 of 200 an epoch
    moved = train(1, generated(tmp_path / "moved", data={"batch_size": 40}, schedule={"steps": 12}))
    assert [line["loss"] for line in moved] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    assert moved[-1]["epoch"] == 2.4


def test_the_diagnosis_names_their_identities(tmp_path: Path) -> None:
    optimizer = {"backbone": {"name": "sgd", "lr": 1e38}, "max_skipped_in_a_row": 1}
    (tmp_path / "config.yaml").write_text(generated(tmp_path, optimizer=optimizer).to_yaml())
    done = pfc("train", tmp_path / "config.yaml", "--nproc", "1")
    assert done.exit_code == 1
    (sample, identity), *_ = re.findall(r"(\d+) \(generated, identity (\d+)\)", done.error)
    assert int(identity) == int(sample) // 10 * 100


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": {"active": 3}}, "data.train.generated: missing"),
        ({"train": GENERATED | {"activ": 3}}, "data.train.activ: unknown key; did you mean active?"),
        ({"train": GENERATED | {"active": 2001}}, "data.train: active (2001) is more than generated (2000)"),
        ({"train": GENERATED | {"image_size": [4, 4]}}, "data.train.image_size.0: found 4, allowed: greater than"),
        ({"train": [GENERATED]}, "data.train.0.path: missing"),
        ({"image_size": [24, 24]}, "data: an image_size other than the generated one, [16, 16] is for images in"),
        ({"augment": {"blur": {"probability": 0.5}}}, "data: augment is for images in files"),
        ({"decode": "gpu"}, "data: decode: gpu is for images in files"),
        ({"order": {"name": "balanced", "identities": 4, "images": 5}}, "data: order: balanced is for images in files"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(data: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_config({"data": {"train": GENERATED} | data, "schedule": {"steps": 1}})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
