"""Whom the ranks of a run that stands still wait for."""

import json
import time
from typing import Any

import pytest
import torch.distributed as dist

from pfc.engine.ranks.watchdog import Heartbeat, Position, Watchdog, verdict
from tests.commands import Command

HERE: dict[str, Any] = {"host": "a", "process_id": 1, "step": 5, "phase": "head", "phases": 40, "collectives": 90}


def positions(*changes: dict[str, Any]) -> dict[int, Position]:
    every = [{"collective": "all_reduce", "stack": "", **HERE, **change} for change in changes]
    return {rank: Position(rank=rank, **fields) for rank, fields in enumerate(every)}


def test_the_rank_in_an_earlier_phase_is_behind():
    late = {"phases": 38, "phase": "waiting for a batch", "collective": None, "collectives": 91}
    blamed, text = verdict(positions({}, {}, late, {"phase": "backward pass"}), 4, 60.0)
    assert blamed == 2
    assert text == (
        "rank 2 of 4 (a) stands still in step 5, waiting for a batch: no progress for 60 s (run.timeout_seconds); "
        "ranks 0, 1 wait in all_reduce (step 5, head), rank 3 waits in all_reduce (step 5, backward pass)"
    )


@pytest.mark.parametrize("late", [{"collectives": 89}, {"collective": None}])
def test_in_the_same_phase_it_is_the_one_that_has_not_called_the_collective(late: dict[str, Any]):
    assert verdict(positions({}, late, {}), 3, 60.0)[0] == 1


def test_a_rank_that_says_nothing_is_behind_all():
    known = positions({}, {}, {"phases": 1})
    del known[1]
    blamed, text = verdict(known, 3, 60.0)
    assert blamed == 1
    assert text.startswith("rank 1 of 3 gave no sign of life, no progress for 60 s")


def test_where_all_wait_in_the_same_place_no_one_is_accused():
    _, text = verdict(positions({}, {}), 2, 60.0)
    assert text.startswith("ranks 0, 1 wait in all_reduce (step 5, head) of 2, without an answer from the others")


def alone(folder: str, how: str) -> None:
    """A rank without others that ends, or hangs."""
    heartbeat = Heartbeat()
    heartbeat.enter("working", 7)
    watchdog = Watchdog(heartbeat, dist.HashStore(), 0, 1, 1.0)
    watchdog.start()
    for _ in range(16):  # longer than it may stand still
        time.sleep(0.1)
        heartbeat.moved()
    with open(f"{folder}/file", "wb", buffering=0) as file:
        heartbeat.enter("saving", on_files=True)
        for _ in range(16):
            time.sleep(0.1)
            file.write(bytes(1 << 21))
    print("still there", flush=True)
    if how == "ends":
        watchdog.stop()
        time.sleep(1.5)
        print("the end", flush=True)
    else:
        time.sleep(1000)


@pytest.mark.parametrize("how", ["ends", "hangs"])
def test_signs_of_life_keep_it_quiet_and_their_absence_ends_the_process(tmp_path, how: str):
    environment = {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    ended = Command(alone, str(tmp_path), how, environment=environment).wait(100)
    assert ended.out.startswith("still there"), ended.error
    if how == "ends":
        assert (ended.exit_code, ended.out) == (0, "still there\nthe end\n")
        return
    assert ended.exit_code == 1
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert told["message"].startswith("Hang: rank 0 of 1")
    assert "step 7, saving" in told["message"]
    assert told["extraInfo"]["py_callstack"].splitlines()[-1] == told["message"]
