"""Protocols that a run is judged by while it trains."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from pfc.data import RecordDataset
from pfc.data.protocols.table import write_protocol
from pfc.engine.log.telemetry import read_json_lines
from pfc.engine.report.write import write_report
from tests.engine.runs import IDENTITIES, PER_IDENTITY, configuration, new_trainer, pack, train
from tests.ranks import run_ranks

SMALL = {"every_steps": 2, "batch_size": 32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = pack(tmp_path_factory.mktemp("data"))
    labels = [image // PER_IDENTITY for image in range(IDENTITIES * PER_IDENTITY)]
    images = [f"train#{image}" for image in range(len(labels))]
    write_protocol(folder / "among.csv", ["image", "identity"], zip(images[:60], labels[:60], strict=True))
    roles = ["gallery" if image % PER_IDENTITY == 0 and image < 100 else "probe" for image in range(len(labels))]
    write_protocol(folder / "find.csv", ["image", "identity", "role"], zip(images, labels, roles, strict=True))
    return folder


def test_protocols_are_judged_on_all_ranks_in_training(folder: Path, tmp_path: Path) -> None:
    section = SMALL | {
        "pairs": [str(folder / "pairs.bin")],
        "sets": [str(folder / "among.csv"), str(folder / "find.csv")],
    }
    found = []
    for ranks in (1, 2):
        config = configuration(
            folder, tmp_path / str(ranks), schedule={"steps": 4}, evaluation=section, data={"batch_size": 6 // ranks}
        )
        train(ranks, config, report=True)
        found.append(read_json_lines(config.run.path / "evaluation.jsonl"))
    assert [(line["step"], line["set"]) for line in found[0]] == [
        (step, name) for step in (0, 2, 4) for name in ("pairs", "among", "find")
    ]
    for one, two in zip(*found, strict=True):
        times = {"seconds": pytest.approx(one["seconds"], abs=100)}
        assert two == pytest.approx({**one, **times}, abs=0.03)  # rounding swaps near images of an untrained network
    last = {line["set"]: line for line in found[0][-2:]}
    assert last["find"]["probes"] + last["find"]["gallery"] == IDENTITIES * PER_IDENTITY
    assert last["find"]["rank_1_low"] <= last["find"]["rank_1"] <= last["find"]["rank_1_high"]  # at the end alone
    assert "rank_1_low" not in found[0][2]

    page = (tmp_path / "1" / "test" / "report.html").read_text()
    assert "TPIR@FPIR 1e-1" in page
    assert "Probes that were least rightly found" in page
    assert re.search(r"<td>Recall@1</td><td>\d", page)
    (folder / "among.csv").rename(folder / "gone.csv")
    try:
        write_report(tmp_path / "1" / "test")
    finally:
        (folder / "gone.csv").rename(folder / "among.csv")
    assert "Pictures are left out" in (tmp_path / "1" / "test" / "report.html").read_text()


def test_a_slow_set_waits_for_the_last_step(folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    section = SMALL | {"sets": [str(folder / "among.csv")], "most_seconds": 1e-6}
    config = configuration(folder, tmp_path, schedule={"steps": 6}, evaluation=section)
    train(1, config)
    lines = read_json_lines(config.run.path / "evaluation.jsonl")
    assert [line["step"] for line in lines] == [0, 6]


def test_a_set_that_is_named_after_the_end_is_not_judged(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, schedule={"steps": 2}, evaluation=SMALL)
    train(1, config)
    again = configuration(
        folder, tmp_path, schedule={"steps": 2}, evaluation=SMALL | {"sets": [str(folder / "among.csv")]}
    )
    train(1, again)
    assert read_json_lines(config.run.path / "evaluation.jsonl") == []


def test_the_best_checkpoint_by_a_figure_of_a_protocol(folder: Path, tmp_path: Path) -> None:
    section = SMALL | {"sets": [str(folder / "among.csv")]}
    best = {"keep": 1, "best": {"metric": "map_at_r"}}
    config = configuration(folder, tmp_path, schedule={"steps": 6}, evaluation=section, checkpoint=best)
    train(1, config)
    lines = read_json_lines(config.run.path / "evaluation.jsonl")[1:]
    champion = max(lines, key=lambda line: line["map_at_r"])
    assert (config.run.path / "checkpoints" / "best").resolve().name == f"step-{champion['step']:08d}"


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"sets": ["nowhere.csv"]}, "nowhere.csv: no such table"),
        ({"sets": ["among.csv", "among.csv"]}, "two sets are called 'among'"),
    ],
)
def test_sets_that_cannot_be_used(folder: Path, tmp_path: Path, section: dict[str, Any], message: str) -> None:
    section = SMALL | {"sets": [str(folder / name) for name in section["sets"]]}
    with pytest.raises(RuntimeError, match=message):
        train(1, configuration(folder, tmp_path, evaluation=section))


def test_a_figure_that_is_not_measured_cannot_choose_the_best(folder: Path, tmp_path: Path) -> None:
    section = SMALL | {"sets": [str(folder / "among.csv")]}
    config = configuration(folder, tmp_path, evaluation=section, checkpoint={"best": {"metric": "rank_1"}})
    with pytest.raises(RuntimeError, match="rank_1 is not measured on 'among', but recall_at_1, "):
        train(1, config)


@pytest.fixture
def photos(folder: Path, tmp_path: Path) -> Path:
    """A protocol of image files."""
    dataset = RecordDataset.open(folder / "train")
    for image in range(12):
        (tmp_path / f"{image}.jpg").write_bytes(bytes(dataset.read(image)[1]))
    write_protocol(tmp_path / "photos.csv", ["image", "identity"], ((f"{i}.jpg", i // 4) for i in range(12)))
    return tmp_path / "photos.csv"


def evaluated_twice(tree: dict[str, Any], lost: str) -> list[str]:
    """On a rank: evaluates, loses an image, trains and evaluates again; what was told."""
    trainer, told = new_trainer(tree), []
    trainer.telemetry.message = told.append  # type: ignore[method-assign]
    try:
        dist.barrier()
        if dist.get_rank() == 0:
            Path(lost).unlink()
        dist.barrier()
        trainer.train_step()
        trainer.train_step()
        return told
    finally:
        trainer.close()


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_image_that_vanishes_does_not_end_the_run(photos: Path, folder: Path, tmp_path: Path, ranks: int) -> None:
    section = {"every_steps": 2, "batch_size": 4, "sets": [str(photos)]}
    config = configuration(folder, tmp_path / "runs", schedule={"steps": 4}, evaluation=section)
    for told in run_ranks(ranks, evaluated_twice, config.model_dump(), str(tmp_path / "11.jpg")):
        assert "photos is not evaluated: 11.jpg: no such file or directory" in " ".join(told)
    assert [line["step"] for line in read_json_lines(config.run.path / "evaluation.jsonl")] == [0]


def test_a_cut_file_of_figures_does_not_stop_the_report(folder: Path, tmp_path: Path) -> None:
    section = SMALL | {"sets": [str(folder / "among.csv")], "pairs": [str(folder / "pairs.bin")]}
    config = configuration(folder, tmp_path, schedule={"steps": 2}, evaluation=section)
    train(1, config)
    for path in (config.run.path / "evaluation").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert "Recall@1 on among" in write_report(config.run.path).read_text()
