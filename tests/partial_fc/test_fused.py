"""The fused kernels of a GPU against the plain ones, interpreted on a CPU; and, where there is a GPU, on it."""

import importlib
import itertools
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.partial_fc import fused_cases
from tests.partial_fc.cases import SEEING, SETTINGS, Case, compare, relative_error
from tests.partial_fc.fused_cases import KernelCase
from tests.ranks import RankPool

pytest.importorskip("triton")

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def pools() -> Iterator[dict[int, RankPool]]:
    """Ranks in whose processes Triton interprets."""
    started = {world_size: RankPool(world_size, interpreted=True) for world_size in (1, 2)}
    yield started
    for pool in started.values():
        pool.close()


@pytest.fixture
def call(pools: dict[int, RankPool]) -> Call:
    """Calls a function in a process where Triton interprets."""
    return lambda function, *args: pools[1].call(function, *args)[0]


def test_a_sample_with_fixed_shapes_is_the_same_sample(call: Call) -> None:
    assert call(fused_cases.same_samples) > 20, "labels that the draw had chosen anyway"
    call(fused_cases.same_batches)


EXACT = [
    KernelCase(),
    KernelCase(keep=False),
    KernelCase(stored=150),
    KernelCase(stored=150, keep=False, dim=40),
    KernelCase(hard={"threshold": 0.3, "constant": float("-inf")}),
    KernelCase(hard={"threshold": 0.1, "square": 1.0, "slope": 0.6}, keep=False),
    KernelCase(hard={"threshold": 0.1, "slope": 0.9, "sine": 0.3, "constant": 0.01}, stored=150),
    KernelCase(softplus=1.0),
    KernelCase(softplus=3.0, keep=False, scale=40.0),
    KernelCase(softplus=1.0, scale=8.0, shift=-24.0),
    KernelCase(batch=70, rows=150, dim=100, scale=20.0),
]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_in_float32_every_number_is_the_plain_kernels(call: Call, case: KernelCase) -> None:
    for name, (value, expected) in call(fused_cases.fused_beside_plain, case).items():
        assert value.dtype == expected.dtype
        assert relative_error(value, expected.double()) < 1e-5, name


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("stored", [150, 200])
def test_with_bfloat16_products_every_number_is_close(call: Call, keep: bool, stored: int) -> None:
    """An operand's rounding moves a cosine by up to 2⁻⁸, mostly far less, and p by 16 times as much at this scale."""
    case = KernelCase(batch=64, dim=96, stored=stored, keep=keep, dtype=torch.bfloat16, scale=16.0)
    numbers = call(fused_cases.fused_beside_plain, case)
    for name in ("total", "unit", "rows"):
        value, expected = numbers[name]
        assert 0 < relative_error(value, expected.double()) < 0.02, name


@pytest.mark.parametrize("name", fused_cases.OPTIMIZERS)
@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_rows_and_state_are_stepped_as_by_the_plain_path(call: Call, name: str, rate: float) -> None:
    factor = 0.25 if rate == 1.0 else 1.0
    plain = fused_cases.trained(name, False, rate, factor)
    bound = 1e-4 if name == "adamw" else 1e-5  # whose step is ±lr for a gradient of any size, rounding included
    for key, value in call(fused_cases.trained, name, True, rate, factor).items():
        assert relative_error(value, plain[key].double()) < bound, key


@pytest.mark.parametrize("name", ["momentum", "of one's own"])
def test_copies_of_rows_stored_elsewhere_are_stepped_alike(call: Call, name: str) -> None:
    plain = fused_cases.trained(name, False, 0.2)
    for key, value in call(fused_cases.trained, name, True, 0.2, 1.0, 24, "host").items():
        assert relative_error(value, plain[key].double()) < 1e-5, key


EACH_BLOCK, AT_ONCE = 1, 1 << 24
"""Numbers of a sum: of each block of classes alone, of all of them."""


@pytest.mark.parametrize(("name", "rate", "keep_bytes", "sum_numbers"), [
    ("momentum", 0.02, 1 << 30, EACH_BLOCK), ("momentum", 0.02, 1 << 30, AT_ONCE), ("momentum", 0.02, 0, EACH_BLOCK),
    ("adamw", 0.02, 1 << 30, EACH_BLOCK), ("of one's own", 0.02, 1 << 30, AT_ONCE), ("momentum", 1.0, 1 << 17, AT_ONCE),
])  # fmt: skip
def test_passes_are_added_as_by_the_plain_path(
    call: Call, name: str, rate: float, keep_bytes: int, sum_numbers: int
) -> None:
    plain = fused_cases.accumulated(name, False, rate, keep_bytes)
    bound = 1e-4 if name == "adamw" else 1e-5
    for key, value in call(fused_cases.accumulated, name, True, rate, keep_bytes, sum_numbers).items():
        assert relative_error(value, plain[key].double()) < bound, key


@pytest.mark.parametrize(("name", "rate", "passes"), [
    *((name, 0.02, 1) for name in fused_cases.OPTIMIZERS), ("momentum", 1.0, 1),
    ("momentum", 0.02, 3), ("of one's own", 0.02, 3), ("momentum", 1.0, 3),
])  # fmt: skip
def test_no_step_asks_the_device(call: Call, name: str, rate: float, passes: int) -> None:
    """How several passes are added is the same for every optimizer that has a pass of its own."""
    assert call(fused_cases.questions_of_steps, name, rate, passes) == [0, 0]


@pytest.mark.parametrize("name", fused_cases.OPTIMIZERS)
@pytest.mark.parametrize("rate", [1.0, 0.2])
def test_a_broken_step_writes_nothing(call: Call, name: str, rate: float) -> None:
    assert call(fused_cases.broken_step, name, rate)


def test_offsets_have_64_bits(call: Call, tmp_path: Path) -> None:
    call(fused_cases.far_rows, str(tmp_path))


HEADS = [
    Case("cosface", {"scale": 64.0, "margin": 0.35}),
    Case("arcface", {"scale": 64.0, "margin": 0.5}, sample_rate=0.3, labels="same"),
    Case("d_softmax", {"scale": 32.0, "stop": 0.9}, sample_rate=0.3, batch_rate=0.5, keep_bytes=0),
    Case("cosface", {"scale": 32.0, "margin": 0.35, "filter": 0.2}, sample_rate=0.5, labels="low"),
    Case("softmax", {"scale": 30.0}, num_classes=1, sample_rate=0.5),
    Case("softmax", {"scale": 30.0}, num_classes=9001, dim=8, sample_rate=0.02),
    Case(*SETTINGS["combined (1, 0.3, 0.2)"], sample_rate=0.3),
    Case(*SETTINGS["combined (0.9, 0.4, 0.15)"], keep_bytes=0),
    Case("cosface", {"scale": 64.0, "margin": 0.35}, sample_rate=0.3, surroundings=torch.bfloat16),
    Case(*SEEING["magface"], sample_rate=0.3),
    Case(*SEEING["curricularface"], sample_rate=0.3, keep_bytes=0),
    Case(*SEEING["mv_softmax, adaptive"], batch_rate=0.5),
    Case(*SEEING["inter_top_k"], sample_rate=0.3, weighted=True),
    Case(*SEEING["sphereface2"], sample_rate=0.3, batch_rate=0.5),
    Case(*SEEING["uniface"], keep_bytes=0),
]


ON_RANKS = [(case, ranks) for case in HEADS for ranks in (1, 2) if case.num_classes > 1 or ranks == 2]
"""A single class is the first of two ranks', which is as good as alone."""


@pytest.mark.parametrize(("case", "world_size"), ON_RANKS, ids=str)
def test_the_whole_head_is_the_oracles(pools: dict[int, RankPool], case: Case, world_size: int) -> None:
    results = pools[world_size].call(fused_cases.step_fused, case)
    compare(case, results)


# What a kernel is compiled for, as Triton writes types; flags are constants.
ROWS = {"HAS_INDEX": True, "TILE": 4, "WIDTH": 512}
UPDATE = "slopes:*fp32 weight:*fp32 inverse:*fp32 index:*i64 factor:*fp32 broken:*u8 count:i32 dim:i32 "
POWERS = (
    "index:*i64 columns:*i64 sums:*fp32 threshold:*fp32 numbers:*fp32 probabilities:*fp32 count:i32 padded:i32 "
    "batch:i32 dim:i32 first:i32 scale:fp32 power_of:fp32 "
)
FLAGS = {
    "HAS_INDEX": True, "HAS_HARD": False, "SOFTPLUS": False, "CURVED": False, "HAS_SUMS": True, "EVEN": True,
    "WIDEN": False, "PRECISION": "ieee",
}  # fmt: skip
HARD: dict[str, Any] = {"HAS_HARD": True}
SOFTPLUS: dict[str, Any] = {"SOFTPLUS": True, "CURVED": True}
TF32: dict[str, Any] = {"tiles": "tf32", "PRECISION": "tf32"}
DRAW = (
    "rows:*i64 offsets:*i64 labels:*i64 found:*i64 values:*i64 batch:i32 first_block:i32 start:i32 stop:i32 key:i64 "
    "last_block:i32 last_size:i32 last_bits:i32 count:i32 size:i32 bits:i32"
)
COMPILED: list[tuple[str, str, str, dict[str, Any]]] = [
    ("powers", "powers_kernel", POWERS + "rows:*bf16 unit:*bf16 power:*bf16", FLAGS | {"tiles": torch.bfloat16}),
    *(
        (
            "powers",
            "powers_kernel",
            POWERS + "rows:*bf16 unit:*bf16 power:*bf16",
            FLAGS | {"tiles": torch.bfloat16} | also,
        )
        for also in (HARD, SOFTPLUS)
    ),
    ("powers", "powers_kernel", POWERS + "rows:*fp32 unit:*fp32 power:*fp32", FLAGS | {"tiles": torch.float32}),
    ("powers", "powers_kernel", POWERS + "rows:*fp32 unit:*fp32 power:*fp32", FLAGS | TF32),
    ("rows", "normalize_kernel", UPDATE + "unit:*bf16 padded:i32", ROWS | {"TF32": False}),
    ("rows", "normalize_kernel", UPDATE + "unit:*fp32 padded:i32", ROWS | {"TF32": True}),
    ("update", "project_kernel", UPDATE, ROWS),
    (
        "update",
        "sgd_kernel",
        UPDATE + "velocity:*fp32 lr:fp32 momentum:fp32 decay:fp32",
        ROWS | {"HAS_MOMENTUM": True, "NESTEROV": True},
    ),
    (
        "update",
        "adamw_kernel",
        UPDATE + "first:*fp32 second:*fp32 steps:*fp32 lr:fp32 beta2:fp32 rest1:fp32 rest2:fp32 log1:fp32 log2:fp32 "
        "eps:fp32 decay:fp32",
        ROWS,
    ),
    ("update", "adagrad_kernel", UPDATE + "total:*fp32 lr:fp32 eps:fp32 decay:fp32", ROWS),
    ("update", "write_kernel", UPDATE + "values:*fp32 target:*fp32", ROWS),
    (
        "update",
        "own_kernel",
        UPDATE + "places:*i64 begin:*i64 end:*i64 own:*fp32 start:i32",
        {"WIDTH": 512},
    ),
    ("draw", "draw_kernel", DRAW, {"BITS": 12, "PLACES": 512}),
    ("draw", "find_kernel", DRAW, {"BITS": 12, "PLACES": 128}),
    ("draw", "permute_kernel", DRAW, {"PLACES": 128}),
]


CAPABILITIES = (80, 90, 100)  # A100, H100, B200
MOST_REGISTERS_OF = {"powers_kernel": 224}
"""Of a thread, as measured and a few more: 8 warps of 255 fit a multiprocessor. Of the other kernels 104."""
COUNTING = ("adamw_kernel", "adagrad_kernel")
"""They write what they have read before: not while another warp still reads it."""


def test_every_kernel_compiles_for_cards_that_are_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes what the compiler refuses. To machine code, whose registers suffice: nothing is spilled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for capability, (module, name, types, constants) in itertools.product(CAPABILITIES, COMPILED):
        kernel = getattr(importlib.import_module(f"pfc.partial_fc.kernels.fused.{module}"), name)
        code = _compiled(kernel, types, dict(constants), capability)
        registers, spilled = _resources(code["cubin"], tmp_path)
        print(f"sm_{capability} {name} {constants.get('tiles', '')}: {registers} registers, {spilled} bytes spilled")
        assert spilled == 0, (capability, name)
        assert registers <= MOST_REGISTERS_OF.get(name, 104), (capability, name)
        if name in COUNTING:  # numbers of a row, which several warps hold
            lines = code["ttgir"].splitlines()
            barrier = next(place for place, line in enumerate(lines) if "barrier" in line)
            assert barrier < next(place for place, line in enumerate(lines) if "tt.store" in line), (capability, name)


def test_operands_of_tf32_products_are_rounded_to_nearest(call: Call) -> None:
    """Triton's product cuts off what a tensor core does not read."""
    values, operands = call(fused_cases.operands, "tf32")
    mantissa = torch.finfo(torch.float32).eps * 2**13
    assert (operands - values).abs().max() <= values.abs().max() * mantissa / 2
    assert ((operands - values).sign().sum().abs() < len(values) ** 0.5 * values.shape[1]).all(), "not towards zero"
    assert (operands.view(torch.int32) & 0x1FFF == 0).all()


def _resources(code: bytes, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, as the binary tells."""
    import triton.backends.nvidia

    binary = folder / "kernel.cubin"
    binary.write_bytes(code)
    tool = Path(triton.backends.nvidia.__path__[0]) / "bin" / "cuobjdump"
    told = subprocess.run([tool, "--dump-resource-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", told)
    assert found is not None, told
    return int(found[1]), int(found[2]) + int(found[3])


def _compiled(kernel: Any, types: str, constants: dict[str, Any], capability: int) -> dict[str, Any]:
    """The stages of a compilation, by name."""
    from triton import compile as build
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {}
    if "tiles" in constants:
        from pfc.partial_fc.kernels.fused.powers import tiles_of

        plain = not (constants["SOFTPLUS"] or constants["HAS_HARD"])
        tiles = tiles_of(constants.pop("tiles"), capability // 10, plain=plain)
        constants |= {"ROWS": tiles.rows, "BATCH": tiles.batch, "DIM": tiles.dim}
        options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    given = dict(pair.split(":") for pair in types.split())
    signature = {name: "constexpr" if name in constants else given[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    divisible = [name for name in kernel.arg_names if signature[name].startswith("*") or name == "dim"]
    hints = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in divisible}
    source = ASTSource(kernel, signature, values, hints)  # pyright: ignore[reportArgumentType]
    return build(source, target=GPUTarget("cuda", capability, 32), options=options).asm  # pyright: ignore


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_compiled_kernels_too(case: KernelCase) -> None:
    for name, (value, expected) in fused_cases.fused_beside_plain(replace(case, device="cuda")).items():
        assert relative_error(value, expected.double()) < 1e-5, name
