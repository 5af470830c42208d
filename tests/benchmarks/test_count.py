"""What a step is counted to take, and what this machine is measured to give."""

import pytest
import torch

from pfc.benchmarks import ceilings
from pfc.benchmarks.ceilings import Ceilings
from pfc.benchmarks.head.case import HeadCase
from pfc.benchmarks.head.phases import kind_of
from pfc.benchmarks.ranks import Rank
from pfc.partial_fc.sampling import expected_rows


def test_operations_and_bytes_are_those_counted_by_hand() -> None:
    # C=1000 on 2 ranks at rate 1: K = 500 rows of 16 numbers, B = 8.
    whole = HeadCase("pfc", 1000, dim=16, batch=8).work
    assert whole.rows == 500
    three, four = whole.ways
    assert three.operations == 6 * 8 * 500 * 16 == 384_000
    assert four.operations == 8 * 8 * 500 * 16 == 512_000
    assert four.bytes == 4 * 5 * 500 * 16 == 160_000  # the rows read twice and written, momentum read and written
    assert three.bytes == four.bytes + 2 * 4 * 8 * 500  # and the probabilities written and read
    assert HeadCase("pfc", 1000, dim=16, batch=8, precision="bf16").work.ways[0].bytes == 160_000 + 2 * 2 * 8 * 500
    gram = HeadCase("pfc", 1000, dim=16, batch=8, objective="p2sgrad").work.ways[2]
    assert (gram.operations, gram.bytes) == (4 * 500 * 256 + 4 * 8 * 256, 160_000)


def test_the_batch_brings_its_classes_into_the_sample() -> None:
    assert expected_rows(1000, 2, 1.0, 8) == 500
    # Of 2 classes on one rank and 1 label, half are sampled: K = 1 + ½ · 1 (the batch's class, if not sampled already).
    assert expected_rows(2, 1, 0.5, 1) == pytest.approx(1.5)
    assert expected_rows(10**6, 2, 0.1, 128) == pytest.approx(50_000 + 0.9 * 64, rel=1e-4)


def test_the_floor_takes_the_cheaper_way() -> None:
    case = HeadCase("pfc", 1000, dim=16, batch=8)
    fast_memory = Ceilings(2, {"float32": 1e6}, 1e12)
    assert case.work.floor(fast_memory, "float32") == pytest.approx(0.384 + 192_000e-12)
    fast_products = Ceilings(2, {"float32": 1e12}, 1e6)
    assert case.work.floor(fast_products, "float32") == pytest.approx(0.160 + 512_000e-12)


def test_ceilings_are_measured_by_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    # In this process, on matrices that take no time.
    monkeypatch.setattr(ceilings, "_SIDE", {"cpu": 64})
    monkeypatch.setattr(ceilings, "_NUMBERS", 1 << 12)
    monkeypatch.setattr(Rank, "wait", lambda _: None)
    found = ceilings._measure(Rank(0, 1, torch.device("cpu")), ["float32", "bf16"], 0.01)
    assert found["products"].keys() == {"float32", "bf16"}
    assert min(*found["products"].values(), found["bandwidth"]) > 1e6
    low, high = Ceilings(1, {"float32": 1.0}, 4.0), Ceilings(1, {"float32": 2.0}, 3.0)
    assert low.best(high) == Ceilings(1, {"float32": 2.0}, 4.0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("aten::mm", "products"),
        ("aten::addmm_", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "products"),
        ("aten::index_select", "rows"),
        ("pfc_sgd", "rows"),
        ("pfc_exponentials", "elementwise"),
        ("aten::exp_", "elementwise"),
        ("ncclDevKernel_AllGather_RING_LL", "exchange"),
    ],
)
def test_operators_are_put_together_by_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind
