"""``pfc bench accuracy``: variants of a run, several seeds each."""

import json
from pathlib import Path

import pytest
import yaml

from pfc.benchmarks.accuracy import read_variants
from pfc.data import RecordDataset, make_pairs, pack_synthetic, write_pairs
from pfc.launch.cli import main

VARIANTS = "cosface: {head.objective: {name: cosface, scale: 16.0}}\nnarrow: {head.center_dtype: bf16}\n"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A run of three steps; beside it variants.yaml."""
    pack_synthetic(tmp_path / "set", identities=6, images_per_identity=4, size=32, workers=1)
    write_pairs(tmp_path / "pairs.bin", make_pairs(RecordDataset.open(tmp_path / "set"), 20, seed=0))
    tree = {
        "data": {"train": str(tmp_path / "set"), "batch_size": 4},
        "backbone": {"name": "small", "embedding_dim": 16, "options": {"width": 8}},
        "schedule": {"steps": 3},
        "evaluation": {"pairs": [str(tmp_path / "pairs.bin")]},
        "log": {"tensorboard": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "variants.yaml").write_text(VARIANTS)
    return tmp_path / "run.yaml"


def test_every_variant_is_trained_with_every_seed(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.parent
    command = ["bench", "accuracy", str(config), "optimizer.accumulate=2", "--variants", str(folder / "variants.yaml")]
    command += ["--out", str(folder / "out"), "--seeds", "2", "--json", str(folder / "figures.json")]
    assert main(command) == 0
    told = capsys.readouterr().out
    figures = json.loads((folder / "figures.json").read_text())["variants"]
    assert list(figures) == ["cosface", "narrow"]
    for name, seeds in figures.items():
        assert list(seeds) == ["0", "1"]
        for seed, found in seeds.items():
            settings = yaml.safe_load((folder / "out" / f"{name}-{seed}" / "config.yaml").read_text())
            assert settings["run"]["seed"] == int(seed)
            assert settings["optimizer"]["accumulate"] == 2
            assert settings["head"]["center_dtype"] == ("bf16" if name == "narrow" else "float32")
            assert settings["head"]["objective"]["name"] == ("cosface" if name == "cosface" else "d_softmax")
            assert found["pairs"]["step"] == 3
        accuracies = [found["pairs"]["accuracy"] for found in seeds.values()]
        (line,) = (line for line in told.splitlines() if line.startswith(name))
        assert f"{sum(accuracies) / 2:.4f} ± {abs(accuracies[0] - accuracies[1]) / 2**0.5:.4f}" in line

    metrics = folder / "out" / "cosface-0" / "metrics.jsonl"
    written = metrics.read_bytes()
    assert main(command) == 0, "started again, it has all of it"
    assert capsys.readouterr().out == told
    assert metrics.read_bytes() == written


def test_what_is_wrong_is_told_before_anything_is_trained(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = config.parent
    command = ["bench", "accuracy", str(config), "--variants", str(folder / "variants.yaml"), "--out"]
    for text, told in (
        ("[1, 2]", "variants are a mapping, name: {key.sub: value}"),
        ("a/b: {}", "'a/b' is the name of a folder too"),
        ("a: 3", "a: expected {key.sub: value}, found 3"),
        ("a: {head.objective: {name: none}}", "unknown objective 'none'"),
        ("a: [", "variants.yaml: while parsing"),
    ):
        (folder / "variants.yaml").write_text(text)
        assert main([*command, str(folder / "out")]) == 2
        assert told in capsys.readouterr().err
    assert main([*command[:3], "--variants", str(folder / "nowhere.yaml"), "--out", str(folder / "out")]) == 2
    assert capsys.readouterr().err == f"pfc: {folder / 'nowhere.yaml'}: no such file or directory\n"
    (folder / "variants.yaml").write_text(VARIANTS)
    assert main([*command, str(folder / "out"), "evaluation.pairs=[]"]) == 2
    assert "evaluation.pairs are what the variants are judged by" in capsys.readouterr().err
    assert not (folder / "out").exists()
    assert main([*command, str(folder / "out"), f"data.train={folder / 'nowhere'}"]) == 2
    error = capsys.readouterr().err
    assert "-0: " in error
    assert "nowhere" in error
    assert len(error.splitlines()) == 1


def test_the_variants_that_come_along_are_accepted() -> None:
    for file in (Path(__file__).parents[2] / "configs" / "variants").glob("*.yaml"):
        assert len(read_variants(file)) > 1
