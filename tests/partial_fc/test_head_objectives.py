"""Objectives that see more than two numbers, sub-centers and class weights against the oracle, on 1, 2 and 3 ranks."""

import itertools
from dataclasses import replace

import pytest
import torch

from tests.partial_fc.cases import SEEING, SETTINGS, SHAPES, SHAPES_AND_RATES, WORLDS, Case, check


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("setting", SEEING)
def test_objectives_that_see_more_are_the_oracles(setting: str, world_size: int) -> None:
    name, parameters = SEEING[setting]
    dtypes = itertools.cycle((torch.float32, torch.float64, torch.float64))  # three, so that each rate meets both
    budgets = itertools.cycle((1 << 30, 0))
    cases = [
        Case(name, parameters, dtype=dtype, keep_bytes=budget, **fields)
        for fields, dtype, budget in zip(SHAPES_AND_RATES, dtypes, budgets, strict=False)
    ]
    check(cases, world_size)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("setting", ["curricularface", "mv_softmax, adaptive", "mv_softmax, fixed", "inter_top_k"])
def test_hard_negatives_by_the_plain_kernel_are_the_oracles(setting: str, world_size: int) -> None:
    name, parameters = SEEING[setting]
    check((Case(name, parameters | {"scale": 100.0}, **fields) for fields in SHAPES_AND_RATES), world_size)


SUB_CENTERS: list[Case] = [
    Case(name, parameters, dtype=dtype, sub_centers=count, keep_bytes=keep, weighted=count == 3, **fields)
    for (name, parameters), (dtype, count, keep) in itertools.product(
        [*SETTINGS.values(), *(SEEING[name] for name in ("adaface", "curricularface", "inter_top_k", "sphereface2"))],
        [(torch.float64, 3, 1 << 30), (torch.float32, 2, 0)],
    )
    for fields in (SHAPES["does not divide"], {"sample_rate": 0.3}, {"num_classes": 2, "batch_rate": 0.5})
]


@pytest.mark.parametrize("world_size", WORLDS)
def test_sub_centers_and_class_weights_are_the_oracles(world_size: int) -> None:
    check(SUB_CENTERS, world_size)
    scaled = [replace(case, parameters=case.parameters | {"scale": 100.0}) for case in SUB_CENTERS if case.parameters]
    check([case for case in scaled if case.objective not in ("sphereface2",)], world_size)
