"""The recipes: every one is complete, trains on data of its shape, and is copied by ``pfc new recipe``."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pfc.configs import about, recipes
from pfc.data import RecordDataset, make_pairs, pack_synthetic, write_pairs
from pfc.engine.config import load_config
from pfc.engine.log.telemetry import read_json_lines
from pfc.launch.cli import main
from tests.engine.runs import train

SMALL: dict[str, dict[str, Any]] = {
    "iresnet": {"name": "small", "options": {"width": 8}},
    "vit": {"name": "vit_t", "options": {"patch": 28}},
    "timm/": {"name": "timm/resnet10t"},
}
"""What takes a backbone's place in a test, by how its name begins."""


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed set of each image size that recipes have, and of one with pairs and a protocol."""
    folder = tmp_path_factory.mktemp("sets")
    for recipe in recipes().values():
        height, width = yaml.safe_load(recipe.read_text())["data"]["image_size"]
        out = folder / f"{height}x{width}"
        if not out.exists():
            pack_synthetic(out, identities=20, images_per_identity=4, size=max(height, width), workers=1)
            write_pairs(folder / f"{out.name}.bin", make_pairs(RecordDataset.open(out), 20, seed=0))
    return folder


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_trains_on_data_of_its_shape(name: str, sets: Path, tmp_path: Path) -> None:
    if (recipe := recipes()[name].read_text()).count("timm/"):
        pytest.importorskip("timm")
    tree = yaml.safe_load(recipe)
    size = "x".join(map(str, tree["data"]["image_size"]))
    begins = next(prefix for prefix in SMALL if tree["backbone"]["name"].startswith(prefix))
    backbone = {**tree["backbone"], **SMALL[begins], "embedding_dim": 16}
    if begins != "iresnet" and "options" in tree["backbone"]:
        backbone["options"] = {**tree["backbone"]["options"], **SMALL[begins].get("options", {})}
    tree |= {"run": {"name": name, "dir": str(tmp_path)}, "backbone": backbone}
    if begins != "iresnet":
        tree["precision"] = "float32"  # which a CPU computes ten times as fast
    tree["data"] |= {"train": str(sets / size), "batch_size": 4, "threads": 1}
    if "identities" in tree["data"].get("order", {}):
        tree["data"]["order"] |= {"identities": 4, "images": 2}
    tree["optimizer"] |= {"accumulate": min(2, tree["optimizer"].get("accumulate", 1))}
    tree["schedule"] |= {"epochs": None, "steps": 2, "warmup_steps": 1}
    pairs = [str(sets / f"{size}.bin")] if tree["evaluation"].get("pairs") else []
    tree["evaluation"] |= {"pairs": pairs, "sets": [], "every_steps": 100}
    tree["checkpoint"] |= {"every_minutes": None, "every_steps": 100}
    if best := tree["checkpoint"].pop("best", None):
        tree["checkpoint"]["best"] = {"metric": "accuracy"} if pairs else None
        assert best.keys() <= {"set", "metric"}
    if "init" in tree:
        begun = {**tree, "init": {}, "run": {"name": "first", "dir": str(tmp_path)}}
        path = tmp_path / "first.yaml"
        path.write_text(yaml.safe_dump(begun))
        train(2, load_config(path))
        tree["init"] |= {"path": str(tmp_path / "first")}
    path = tmp_path / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = load_config(path)
    assert len(train(2, config)) >= 1
    assert read_json_lines(config.run.path / "metrics.jsonl")[-1]["step"] == 2


def test_best_checkpoints_of_recipes_name_figures_that_are_measured() -> None:
    """Which figures a set gives is known when it is evaluated; the names are those of docs/evaluation.md."""
    known = {"accuracy", "rank_1", "recall_at_1", "map"}
    for recipe in recipes().values():
        tree = yaml.safe_load(recipe.read_text())
        if best := tree["checkpoint"].get("best"):
            sets = [Path(path).stem for key in ("pairs", "sets") for path in tree["evaluation"].get(key, [])]
            assert best.get("set", sets[0]) in sets
            assert best.get("metric", "accuracy") in known


def test_new_recipe_lists_copies_and_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new", "recipe"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in listed] == list(recipes())
    assert all(about(path) in line for line, path in zip(listed, recipes().values(), strict=True))
    assert main(["new", "recipe", "sop"]) == 0
    assert "pfc plan sop.yaml" in capsys.readouterr().out
    assert (tmp_path / "sop.yaml").read_text() == recipes()["sop"].read_text()
    for arguments, message in (
        (["sop"], "sop.yaml exists already"),
        (["sopp"], "no recipe 'sopp'; did you mean sop? Known: "),
        (["sop", "other.txt"], "other.txt: the name must end in .yaml or .yml"),
    ):
        assert main(["new", "recipe", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert main(["new", "recipe", "sop", "sub/mine.yaml"]) == 0
    assert sorted(path.name for path in tmp_path.rglob("*.yaml")) == ["mine.yaml", "sop.yaml"]
