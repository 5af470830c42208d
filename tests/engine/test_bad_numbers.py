"""Losses and gradients that are not finite, and losses that jump."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pfc.data import RecordDataset
from pfc.engine.checkpoint import find_all
from pfc.engine.diagnosis import NotFinite
from pfc.engine.spikes import SpikeWatch
from pfc.engine.trainer import Trainer
from tests.engine.runs import configuration, new_trainer, pack
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data"))


def steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.train_step()
        trainer.consult()


def diagnosis(tree: dict[str, Any], where: str) -> tuple[int, str, list[int]]:
    """On a rank: rank 1 is broken after the first step; the step that ended the run, and why."""
    trainer = new_trainer(tree)
    steps(trainer, 1)
    spoil = trainer.training_step.micro_batch

    def spoiled(images: torch.Tensor, labels: torch.Tensor, *, last: bool) -> torch.Tensor:
        images[2, 0, 0, 0] = torch.nan
        return spoil(images, labels, last=last)

    if dist.get_rank() == 1:
        if where == "image":
            trainer.training_step.micro_batch = spoiled
        elif where == "parameter":
            with torch.no_grad():
                dict(trainer.network.named_parameters())["fc.weight"][3] = torch.inf
        elif where == "center":
            with torch.no_grad():
                trainer.head.weight[0, 0] = torch.nan
        elif where == "gradient":
            layer = dict(trainer.network.named_modules())["fc"]
            layer.register_full_backward_hook(lambda _module, given, _: (given[0] * torch.nan,))
    try:
        with pytest.raises(NotFinite) as caught:
            steps(trainer, 10)
        return trainer.step, str(caught.value), trainer.batches[0].samples.tolist()
    finally:
        trainer.close()


@pytest.mark.parametrize(
    ("where", "told"),
    [
        ("image", "not finite first: the images, on rank(s) 1\n"),
        ("parameter", "not finite first: parameter fc.weight (Linear), on rank(s) 1\n"),
        ("center", "not finite first: the centers of this rank, on rank(s) 1\n"),
        ("gradient", "not finite first: gradient by the activation of layers.9 (Conv2d), on rank(s) 1\n"),
    ],
)
def test_a_run_of_skipped_steps_ends_with_a_diagnosis(folder: Path, tmp_path: Path, where: str, told: str) -> None:
    config = configuration(folder, tmp_path, optimizer={"max_skipped_in_a_row": 3})
    results = run_ranks(2, diagnosis, config.model_dump(), where)
    assert [step for step, _, _ in results] == [4, 4], "one good step, three skipped ones"
    texts = {text for _, text, _ in results}
    assert len(texts) == 1
    (text,) = texts
    assert "3 steps in a row were skipped, the last one step 4" in text
    assert told in text
    samples = results[1][2][2:3] if where == "image" else results[1][2]
    dataset = RecordDataset.open(folder / "train")
    named = []
    for sample in samples:
        shard, position = dataset.locate(sample)
        named.append(f"{sample} ({shard.file.path}, key {int(shard.keys[position])})")
    assert f"samples of rank 1: {', '.join(named)}" in text


def recovered(tree: dict[str, Any]) -> tuple[int, int]:
    """On a rank: three steps are skipped, and the answer to how many comes a step late, as a GPU's does."""
    trainer = new_trainer(tree)
    told, now = 0, trainer.training_step.skipped_lately

    def late() -> int:
        nonlocal told
        before, told = told, now()
        return before

    trainer.training_step.skipped_lately = late
    micro_batch = trainer.training_step.micro_batch

    def spoiled(images: torch.Tensor, labels: torch.Tensor, *, last: bool) -> torch.Tensor:
        if trainer.step < 3:
            images[0, 0, 0, 0] = torch.nan
        return micro_batch(images, labels, last=last)

    trainer.training_step.micro_batch = spoiled
    steps(trainer, 8)
    trainer.close()
    return trainer.step, int(trainer.skipped_steps)


def test_a_run_that_has_recovered_meanwhile_goes_on(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, optimizer={"max_skipped_in_a_row": 3})
    assert run_ranks(1, recovered, config.model_dump()) == [(8, 3)]


def test_fp16_may_search_its_scale(folder: Path, tmp_path: Path) -> None:
    config = configuration(folder, tmp_path, precision="fp16", optimizer={"max_skipped_in_a_row": 2})
    assert config.max_skipped_in_a_row == 18
    assert run_ranks(2, count_steps, config.model_dump())[0] == 8


def count_steps(tree: dict[str, Any]) -> int:
    trainer = new_trainer(tree)
    steps(trainer, 8)
    trainer.close()
    return trainer.step


def test_what_a_spike_is() -> None:
    section = configuration(Path(), Path(), spike={"factor": 2.0, "window": 3}).spike
    assert section is not None
    watch = SpikeWatch(section)

    def find(*losses: float) -> Any:
        for step, loss in enumerate(losses):
            watch.add(step, torch.tensor(loss))
        return watch.find()

    assert find(1.0, 90.0) is None, "the window is not full"
    assert find(3.0, 6.0, float("nan")) is None, "less than twice the median of 1, 90, 3; and NaN is another matter"
    spike = find(6.0, 12.5, 1.0)
    assert (spike.step, spike.loss, spike.median) == (1, 12.5, 6.0)
    watch.restart()
    assert find(1.0, 90.0) is None


def spiked(tree: dict[str, Any]) -> tuple[list[int], list[int], list[int], bool, str]:
    """On a rank: the eighth loss and a later one are raised; the steps and positions gone through, and how it ended."""
    trainer = new_trainer(tree)
    update, calls = trainer.training_step.update, 0

    def raised() -> torch.Tensor:
        nonlocal calls
        calls += 1
        norm = update()
        if calls in (8, 14):
            trainer.training_step.loss = trainer.training_step.loss * 100
        return norm

    trainer.training_step.update = raised
    passed, positions, ended = [], [], ""
    before = after = None
    try:
        while trainer.step < trainer.total_steps:
            trainer.train_step()
            if trainer.step == 4 and calls == 4:
                before = trainer.head.weight.detach().clone()
            trainer.consult()
            if calls == 8:
                after = trainer.head.weight.detach().clone()
            passed.append(trainer.step)
            positions.append(trainer.loader.position)
    except RuntimeError as error:
        ended = str(error)
    trainer.saving.saver.wait()
    trainer.close()
    assert before is not None
    assert after is not None
    return passed, positions, [one.step for one in find_all(trainer.run_dir)], torch.equal(before, after), ended


@pytest.mark.parametrize("most", [1, 2])
def test_after_a_spike_the_run_goes_back_and_leaves_the_data_out(folder: Path, tmp_path: Path, most: int) -> None:
    config = configuration(
        folder,
        tmp_path,
        spike={"factor": 5.0, "window": 4, "max_rollbacks": most},
        checkpoint={"every_steps": 4},
        schedule={"steps": 12},
    )
    for passed, positions, saved, restored, ended in run_ranks(2, spiked, config.model_dump()):
        assert passed[:9] == [1, 2, 3, 4, 5, 6, 7, 4, 5], "the checkpoint of step 8 has the spike in it"
        assert positions == [12 * (place + 1) for place in range(len(positions))], "no image comes twice"
        assert restored
        if most == 1:
            assert "the run has gone back 1 times already (spike.max_rollbacks)" in ended
        else:
            assert (passed[-1], ended) == (12, "")
            assert saved == [4, 8, 12]


def test_a_spike_is_only_told_where_nothing_else_is_wanted(folder: Path, tmp_path: Path) -> None:
    spike = {"factor": 5.0, "window": 4, "rollback": False}
    config = configuration(folder, tmp_path, spike=spike, checkpoint={"every_steps": 4}, schedule={"steps": 8})
    for passed, _, _, _, ended in run_ranks(2, spiked, config.model_dump()):
        assert (passed, ended) == (list(range(1, 9)), "")
