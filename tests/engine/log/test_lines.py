from typing import Any, cast

import pytest
import torch
from torch import nn

from pfc.engine import build
from pfc.engine.config import Config, parse_config
from pfc.engine.log import lines
from pfc.engine.ranks.distributed import World

WORLD = World(0, 2, torch.device("cpu"))


def config(head: dict[str, Any], accumulate: int = 1) -> Config:
    tree = {"data": {"train": "somewhere", "batch_size": 64}, "schedule": {"steps": 1}}
    tree["optimizer"] = {"accumulate": accumulate}
    return parse_config({**tree, "head": {"objective": {"name": "cosface"}, **head}})


class Million:
    """As much of a data set as the opening looks at."""

    name, num_classes = "million", 1_000_000

    def __len__(self) -> int:
        return 1


def sampling(head: dict[str, Any], accumulate: int = 1) -> list[str]:
    """What the opening of a run on 2 ranks tells about the classes of a step."""
    told = lines.opening(config(head, accumulate), cast(Any, Million()), 1, nn.Identity(), WORLD, 1, None)
    return [line for line in told if line.startswith("sampling")]


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        # 128 images by 50,000 rows of float32 are 24.4 MiB.
        ({"sample_rate": 0.1}, ["100,000 of 1,000,000 classes on 2 rank(s); probabilities kept (24.4 MiB"]),
        ({"sample_rate": 0.1, "keep_mib": 24}, ["probabilities recomputed (24.4 MiB a rank, 24 allowed)"]),
        (
            {"sample_rate": 0.1, "sample_rate_schedule": [[0.9, 1.0]], "keep_mib": 100},
            ["100,000 of 1,000,000 classes on 2 rank(s); probabilities kept", "recomputed (244.1 MiB"],
        ),
        ({"objective": {"name": "p2sgrad"}}, []),
    ],
)
def test_the_log_says_whether_probabilities_are_kept(head: dict[str, Any], expected: list[str]) -> None:
    told = sampling(head)
    assert len(told) == len(expected)
    assert all(part in line for part, line in zip(expected, told, strict=True))


@pytest.mark.parametrize(
    ("keep_mib", "expected"),
    [
        (100, "probabilities kept (24.4 MiB a rank for each of 4 micro-batches, 100 allowed)"),
        (73, "probabilities kept of 2 micro-batches, recomputed of 2 (24.4 MiB a rank for each, 73 allowed)"),
        (24, "probabilities recomputed (24.4 MiB a rank for each of 4 micro-batches, 24 allowed)"),
    ],
)
def test_the_micro_batches_of_a_step_share_what_may_be_kept(keep_mib: int, expected: str) -> None:
    (told,) = sampling({"sample_rate": 0.1, "keep_mib": keep_mib}, accumulate=4)
    assert told.endswith(expected)


def test_the_head_is_given_what_the_configuration_allows() -> None:
    head = build.build_head(config({"num_classes": 10, "keep_mib": 3}), World(0, 1, torch.device("cpu")))
    assert head.keep_bytes == 3 << 20


@pytest.mark.parametrize(
    ("precision", "rounds", "told"), [("bf16", False, 1), ("bf16", True, 0), ("float32", False, 0)]
)
def test_the_log_says_where_bf16_products_are_float32(
    precision: str, rounds: bool, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "rounds_to_bfloat16", lambda device: rounds)
    changed = config({}).model_copy(update={"precision": precision})
    asked = config({"products": "tf32"})
    for one, expected in ((changed, told), (asked, 1)):
        opening = lines.opening(one, cast(Any, Million()), 1, nn.Identity(), WORLD, 1, None)
        assert len([line for line in opening if "makes the head's products in float32" in line]) == expected
