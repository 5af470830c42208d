"""Tries tile and block sizes of the fused kernels, and leaves the best ones set for what is measured after."""

import statistics
from functools import partial
from typing import Any

import torch
from torch import nn

from ...partial_fc.kernels.fused import logsumexp as fused
from ...partial_fc.kernels.fused import powers as fused_powers
from ...partial_fc.kernels.fused import update as fused_update
from .run import GpuRun
from .speed import pfc_step

_TILES = (
    (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (128, 128, 64, 8, 4), (128, 128, 32, 8, 4),
    (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (64, 256, 64, 4, 3),
)  # fmt: skip
"""As in ``fused_powers.Tiles``."""
_BLOCKS: tuple[tuple[Any, str, tuple[int, ...]], ...] = (
    (fused, "sums", (25, 26, 27, 28)),
    (fused_update, "update", (22, 24, 25, 26)),
)
"""Whose ``BLOCK_NUMBERS``, what it cuts into blocks, powers of two to try."""


def sweep(run: GpuRun) -> None:
    """Tiles of the product with exponentials, then block sizes of a whole step; the best stay."""
    tiles = _times_of_tiles(run)
    best = min(tiles, key=lambda shape: tiles[shape])
    fused_powers.TILES[torch.bfloat16] = fused_powers.Tiles(*best)
    run.free()
    run.results["sweep"] = {
        "tiles": {str(shape): time for shape, time in tiles.items()}, "best": str(best), "blocks": _set_blocks(run),
    }  # fmt: skip
    run.free()


def _times_of_tiles(run: GpuRun) -> dict[tuple[int, int, int, int, int], float]:
    """Tiles → milliseconds of the product."""
    rows, batch, dim = (32768, run.options.batch, run.options.dim) if run.gpu else (256, 8, 32)
    unit, block = (
        nn.functional.normalize(torch.randn(size, dim, device=run.device)).bfloat16() for size in (batch, rows)
    )
    columns = torch.full((batch,), -1, device=run.device)
    power = block.new_empty(rows, batch)
    sums = torch.zeros(rows // 64, batch, device=run.device)
    product = partial(
        fused_powers.powers,
        block,
        unit,
        columns,
        None,
        power,
        sums,
        first=0,
        count=rows,
        compute_dtype=torch.bfloat16,
        scale=64.0,
    )
    times = {}
    for shape in _TILES if run.gpu else _TILES[:2]:
        fused_powers.TILES[torch.bfloat16] = fused_powers.Tiles(*shape)
        try:
            times[shape] = statistics.median(run.times(product, 20 if run.gpu else 1))
        except Exception as error:  # out of shared memory, on a smaller card
            print(f"  {shape}: {type(error).__name__}")
            continue
        rate = 2 * rows * batch * dim / times[shape] / 1e9
        print(f"  tiles {shape}: {times[shape]:.3f} ms, {rate:.0f} TFLOP/s")
    return times


def _set_blocks(run: GpuRun) -> dict[str, float]:
    """Kernel and numbers in a block → milliseconds of a step."""
    found = {}
    with pfc_step(run, 1.0, run.options.keep_gib) as step:
        for module, name, exponents in _BLOCKS:
            times = {}
            for exponent in exponents if run.gpu else exponents[:1]:
                module.BLOCK_NUMBERS = 1 << exponent
                times[exponent] = statistics.median(run.times(step, 8))
                print(f"  blocks of the {name} 2^{exponent}: {times[exponent]:.2f} ms/step")
            module.BLOCK_NUMBERS = 1 << min(times, key=lambda exponent: times[exponent])
            found |= {f"{name} 2^{exponent}": time for exponent, time in times.items()}
    return found
