"""Training from the command line: two ranks, and wrong use."""

import json
from pathlib import Path

from pfc.data import pack_synthetic
from tests.commands import pfc
from tests.launch.conftest import CONFIG


def write_config(folder: Path, tmp_path: Path, steps: int) -> Path:
    path = tmp_path / "config.yaml"
    text = CONFIG.format(folder=folder, steps=steps).replace(f"{folder}/runs", f"{tmp_path}/runs")
    path.write_text(text, encoding="utf-8")
    return path


def assert_wrong_use(arguments: list[str], *told: str, **environment: str) -> None:
    """A command line is wrong use, and the one line of all processes together says these words."""
    ended = pfc("train", *arguments, environment=environment)
    assert ended.exit_code == 2, ended.error
    (line,) = ended.error.splitlines()
    assert line.startswith("pfc: ")
    assert all(word in line for word in told), line


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_two_ranks_train(folder: Path, tmp_path: Path):
    """That they are those of torchrun, bit for bit, tests/launch/test_failures.py shows."""
    config = write_config(folder, tmp_path, steps=2)
    ended = pfc("train", config, "run.name=spawned", "--nproc", "2")
    assert (ended.exit_code, ended.error) == (0, "")
    assert str(tmp_path / "runs/spawned/report.html") in ended.out.replace("\n", "")
    assert len(losses(tmp_path / "runs/spawned")) == 2


def test_a_misspelt_key_is_told_before_any_rank_starts(folder: Path, tmp_path: Path):
    config = write_config(folder, tmp_path, steps=2)
    assert_wrong_use([str(config), "data.bach_size=3"], "data.bach_size", "batch_size")
    assert_wrong_use([str(config), "data.batch_size=many"], "data.batch_size", "many")
    assert not (tmp_path / "runs").exists()


def test_wrong_use_that_the_ranks_find_is_told_once(folder: Path, tmp_path: Path):
    config = write_config(folder, tmp_path, steps=2)
    assert_wrong_use([str(config), "head.num_classes=99", "--nproc", "2"], "99", "6")


def test_a_label_outside_the_range_is_told_once(tmp_path: Path):
    pack_synthetic(tmp_path / "set", identities=6, images_per_identity=4, size=32, workers=1)
    description = tmp_path / "set" / "dataset.json"
    text = json.loads(description.read_text(encoding="utf-8"))
    description.write_text(json.dumps(text | {"identities": 3}), encoding="utf-8")
    config = write_config(tmp_path, tmp_path, steps=300)
    # What is damaged is counted over some 400 images of a rank.
    assert_wrong_use([str(config), "evaluation.pairs=[]", "data.batch_size=40", "--nproc", "2"], "label")


def test_pfc_train_is_not_for_torchrun(folder: Path, tmp_path: Path):
    config = write_config(folder, tmp_path, steps=2)
    assert_wrong_use([str(config)], "-m pfc.launch.train", TORCHELASTIC_RUN_ID="1")
