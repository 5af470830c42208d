"""What a run reads: damaged images, several sets, other orders, and another number of ranks in mid-epoch."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pfc.data import RecordDataset, pack_synthetic
from pfc.data.errors import UsageError
from pfc.data.order.mixed import MixedOrder
from pfc.data.order.orders import Order
from pfc.engine import training_data
from pfc.engine.checkpoint import find_all
from pfc.engine.log.telemetry import read_json_lines
from tests.commands import pfc
from tests.engine.runs import IDENTITIES, configuration, new_trainer, pack, train
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 images of which 1 % are damaged: one undecodable, one cut off, one without bytes, one with a bad magic."""
    folder = tmp_path_factory.mktemp("damaged")
    pack_synthetic(folder / "train", identities=20, images_per_identity=20, size=24, workers=1)
    dataset = RecordDataset.open(folder / "train")
    rec = folder / "train" / "train.rec"
    stored = bytearray(rec.read_bytes())
    offsets = [int(offset) for offset in dataset.shards[0].offsets]
    stored[offsets[50] + 32 : offsets[50] + 72] = bytes(40)
    middle, end = offsets[150] + 300, offsets[151]
    stored[middle:end] = bytes(end - middle)
    stored[offsets[350]] ^= 0xFF
    # One without bytes: its record is shortened to its head, and the rest is another record that no index lists.
    at = offsets[250]
    rest = offsets[251] - at - 32 - 8
    stored[at + 4 : at + 8] = (24).to_bytes(4, "little")
    stored[at + 32 : at + 40] = stored[at : at + 4] + rest.to_bytes(4, "little")
    rec.write_bytes(stored)
    return folder


def test_a_run_over_damaged_images_ends_with_the_right_counts(damaged: Path, tmp_path: Path) -> None:
    config = configuration(damaged, tmp_path, data={"batch_size": 20}, schedule={"steps": None, "epochs": 3})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    done = pfc("train", tmp_path / "config.yaml", "--nproc", "2")
    assert done.exit_code == 0, done.error
    lines = read_json_lines(config.run.path / "metrics.jsonl")
    out = done.out
    assert lines[-1]["step"] == 30
    assert lines[-1]["damaged_records"] == 4
    assert lines[-1]["damaged_replaced"] == 12, "each of the 4 once in each of the 3 epochs"
    named = (config.run.path / "damaged.tsv").read_text().splitlines()
    assert sorted(int(line.split("\t")[1]) for line in named) == [50, 150, 250, 350]
    for key in (50, 150, 250, 350):
        assert out.count(f"train.rec: key {key} at byte") == 1
    assert "damaged    4 record(s), replaced 12 times" in out
    assert "decoded on the CPU by 1 thread(s) a rank" in out
    assert all(np.isfinite([line["loss"] for line in lines]))


def test_the_counts_go_on_after_a_restart(damaged: Path, tmp_path: Path) -> None:
    whole = configuration(damaged, tmp_path / "whole", data={"batch_size": 20}, schedule={"steps": 25})
    lines = train(2, whole)
    moved = configuration(damaged, tmp_path / "moved", data={"batch_size": 20}, schedule={"steps": 25})
    train(2, moved, steps=7)
    one = configuration(damaged, tmp_path / "moved", data={"batch_size": 40}, schedule={"steps": 25})
    resumed = train(1, one)
    assert [line["damaged_replaced"] for line in resumed] == [line["damaged_replaced"] for line in lines]
    assert [line["damaged_records"] for line in resumed] == [line["damaged_records"] for line in lines]
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    assert len((moved.run.path / "damaged.tsv").read_text().splitlines()) == 4


AUGMENTED: dict[str, Any] = {
    "schedule": {"steps": None, "epochs": 1.2},
    "data": {"batch_size": 6, "augment": {"crop": {"probability": 0.5}, "cutout": {"probability": 0.5}}},
}


@pytest.fixture(scope="module")
def stopped(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], Path]:
    """The lines of a run on two ranks, and where the same one is that was stopped after 8 steps."""
    runs = tmp_path_factory.mktemp("runs")
    lines = train(2, configuration(folder, runs / "straight", **AUGMENTED))
    train(2, configuration(folder, runs / "stopped", **AUGMENTED), steps=8)
    return lines, runs / "stopped"


@pytest.mark.parametrize("after", [1, 3, 4])
def test_a_run_stopped_in_mid_epoch_goes_on_on_other_ranks(
    folder: Path, stopped: tuple[list[dict[str, Any]], Path], tmp_path: Path, after: int
) -> None:
    """An epoch has 222 images, 18.5 global batches of 12: stopped at 96, resumed, and through the epoch's end."""
    lines, runs = stopped
    shutil.copytree(runs, tmp_path / "moved", symlinks=True)
    data = AUGMENTED["data"] | {"batch_size": 12 // after}
    resumed = train(after, configuration(folder, tmp_path / "moved", **AUGMENTED | {"data": data}))
    assert resumed[-1]["step"] == lines[-1]["step"] == 23
    assert resumed[-1]["epoch"] == lines[-1]["epoch"]
    assert [line["loss"] for line in resumed] == pytest.approx([line["loss"] for line in lines], rel=1e-4)


def test_epochs_stay_whole_at_another_global_batch(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, schedule={"steps": None, "epochs": 2})
    train(1, config, steps=10)  # 60 of 444 images
    larger = configuration(folder, tmp_path, data={"batch_size": 16}, schedule={"steps": None, "epochs": 2})
    lines = train(2, larger)
    assert lines[-1]["step"] == 10 + 12
    assert lines[-1]["epoch"] == pytest.approx(2, abs=32 / 222)


def test_two_sets_blocks_and_a_dropped_rest(folder: Path, damaged: Path, tmp_path: Path) -> None:
    data = {
        "train": [str(folder / "train"), {"path": str(damaged / "train"), "weight": 0.5}],
        "order": {"name": "blocks", "block_size": 16, "window": 64},
        "remainder": "drop",
        "batch_size": 10,
    }
    config = configuration(folder, tmp_path, data=data, schedule={"steps": None, "epochs": 2})
    lines = train(2, config)
    assert lines[-1]["step"] == 2 * ((222 + 200) // 20)
    assert lines[-1]["damaged_records"] == lines[-1]["damaged_replaced"] > 0
    state = json.loads((find_all(config.run.path)[-1].path / "state.json").read_text())
    assert state["num_classes"] == IDENTITIES + 20
    assert state["position"] == 2 * 422


def test_a_balanced_run(folder: Path, tmp_path: Path) -> None:
    order = {"name": "balanced", "identities": 6, "images": 2}
    lines = train(2, configuration(folder, tmp_path / "two", data={"order": order}))
    alone = train(1, configuration(folder, tmp_path / "one", data={"order": order, "batch_size": 12}))
    assert [line["loss"] for line in alone] == pytest.approx([line["loss"] for line in lines], rel=1e-4)
    config = configuration(folder, tmp_path / "wrong", data={"order": order | {"identities": 5}})
    with pytest.raises(RuntimeError, match=r"5 identities × 2 images are 10, the global batch .* is 6"):
        run_ranks(1, new_trainer, config.model_dump())
    weighted = [{"path": str(folder / "train"), "weight": 2.0}]
    with pytest.raises(RuntimeError, match="weights of sets mean nothing"):
        run_ranks(
            1, new_trainer, configuration(folder, tmp_path, data={"order": order, "train": weighted}).model_dump()
        )


def test_class_weights_of_a_file_and_by_frequency(folder: Path, damaged: Path, tmp_path: Path) -> None:
    several = [{"path": str(folder / "train")}, {"path": str(damaged / "train")}]

    def weights(section: dict[str, Any]) -> np.ndarray:
        config = configuration(folder, tmp_path, data={"train": several}, head={"class_weights": section})
        found = training_data.read_class_weights(config, training_data.open_dataset(config))
        assert found is not None
        return found.numpy()

    labels = training_data.open_dataset(configuration(folder, tmp_path, data={"train": several})).labels(damaged=-1)  # type: ignore[union-attr]
    counts = np.bincount(labels[labels >= 0])
    assert len(set(counts)) > 2
    found = weights({"frequency": 0.5})
    np.testing.assert_allclose(found / found[0], (counts / counts[0]) ** -0.5, rtol=1e-6)
    np.testing.assert_allclose(found[labels[labels >= 0]].mean(), 1, rtol=1e-6)
    np.save(tmp_path / "weights.npy", np.arange(IDENTITIES + 20))
    np.testing.assert_array_equal(weights({"file": str(tmp_path / "weights.npy")}), np.arange(IDENTITIES + 20))
    for value, told in (
        (np.arange(3.0), "must hold 57 numbers, found float64 [3]"),
        (np.full(57, np.nan), "weights must be finite and not negative"),
        (np.array(["x"] * 57), "must hold 57 numbers, found <U1 [57]"),
    ):
        np.save(tmp_path / "wrong.npy", value)
        with pytest.raises(UsageError, match=re.escape(told)):
            weights({"file": str(tmp_path / "wrong.npy")})
    for content in (b"", b"no array"):
        (tmp_path / "wrong.npy").write_bytes(content)
        with pytest.raises(UsageError, match=re.escape(f"head.class_weights.file: {tmp_path / 'wrong.npy'}: ")):
            weights({"file": str(tmp_path / "wrong.npy")})
    with pytest.raises(UsageError, match="give file or frequency, one of the two"):
        weights({"file": "a.npy", "frequency": 0.5})


def test_sets_of_different_image_sizes_need_one_to_be_given(folder: Path, tmp_path: Path) -> None:
    pack_synthetic(tmp_path / "large", identities=3, images_per_identity=3, size=32, workers=1)
    sets = [str(folder / "train"), str(tmp_path / "large")]
    with pytest.raises(RuntimeError, match=r"give data\.image_size"):
        run_ranks(1, new_trainer, configuration(folder, tmp_path, data={"train": sets}).model_dump())
    config = configuration(folder, tmp_path, data={"train": sets, "image_size": [24, 24]}, schedule={"steps": 2})
    assert len(train(1, config)) == 2


def test_the_damage_of_a_whole_set_ends_the_run(folder: Path, tmp_path: Path) -> None:
    pack_synthetic(tmp_path / "train", identities=2, images_per_identity=8, size=24, workers=1)
    rec = tmp_path / "train" / "train.rec"
    stored = bytearray(rec.read_bytes())
    for offset in RecordDataset.open(tmp_path / "train").shards[0].offsets:
        stored[offset + 32 : offset + 64] = bytes(32)
    rec.write_bytes(stored)
    with pytest.raises(RuntimeError, match=r"UsageError: data set 'train': .* are damaged, more than data\.max"):
        train(2, configuration(tmp_path, tmp_path / "runs"))


def test_decoding_on_a_gpu_without_one_is_refused(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, data={"decode": "gpu"})
    with pytest.raises(
        RuntimeError, match=r"UsageError: data\.decode: gpu needs an NVIDIA GPU, this run computes on cpu"
    ):
        train(2, config)


@pytest.mark.parametrize(
    ("cores", "local_ranks", "given", "threads"),
    [(2, 2, None, 1), (2, None, None, 2), (64, 4, None, 8), (12, 4, None, 3), (1, 8, None, 1), (64, 4, 20, 20)],
)
def test_decoding_threads_share_the_cores_among_the_local_ranks(
    cores: int,
    local_ranks: int | None,
    given: int | None,
    threads: int,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if local_ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_ranks))
    assert training_data.decoding_threads(configuration(folder, tmp_path, data={"threads": given})) == threads


@pytest.mark.parametrize("name", ["global", "blocks"])
def test_sets_of_one_size_come_in_orders_of_their_own(name: str, folder: Path, tmp_path: Path) -> None:
    order = {"name": name} | ({"block_size": 4, "window": 16} if name == "blocks" else {})
    positions = np.arange(222)

    def built(sets: int, seed: int) -> Order:
        config = configuration(
            folder, tmp_path, run={"seed": seed}, data={"train": [str(folder / "train")] * sets, "order": order}
        )
        return training_data.build_order(config, training_data.open_dataset(config), 6)

    alone, joint = built(1, 5), built(3, 5)
    assert isinstance(joint, MixedOrder)
    own = [part.at(positions).tolist() for part in joint.orders]
    assert own[0] == alone.at(positions).tolist(), "the first set comes as if it were alone"
    assert own[1] != own[0]
    assert own[2] not in own[:2]
    others = built(3, 6)
    assert isinstance(others, MixedOrder)
    assert others.orders[0].at(positions).tolist() not in own, "nor is another seed's first set this one's second"
