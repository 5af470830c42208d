"""All that the head does differently on a GPU and on a CPU. What is not here takes the same calls on both.

Apart from this module only ``kernels/native.py`` distinguishes devices: its passes read the memory of a CPU.
"""

import functools
import importlib.util
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

_WIDEST = 8192  # a row of it, its gradient and its momentum still fit the registers of one program
# Of a block of rows. On a CPU it, its product and its update stay in a thread's cache; a GPU wants large launches.
_BLOCK_BYTES_CPU, _BLOCK_BYTES_GPU = 1 << 20, 1 << 27


def host_sees(device: torch.device) -> bool:
    """Whether the host may look at a number there at once. Elsewhere it would wait for all that is queued before."""
    return device.type == "cpu"


def multiplies_to_float32(device: torch.device) -> bool:
    """Whether a product of bfloat16 tensors can answer in float32; a CPU's rounds its result to bfloat16."""
    return device.type != "cpu"


def interprets(device: torch.device) -> bool:
    """Whether Triton's kernels are interpreted there, in the tests, which cannot multiply bfloat16."""
    return device.type == "cpu"


def fits(weight: Tensor, operands: torch.dtype) -> bool:
    """Whether the fused kernels take a step on these centers; where not, torch's own operations do, there too."""
    return (
        runs_on(weight.device)
        and weight.dtype == torch.float32
        and operands in (torch.float32, torch.bfloat16)
        and weight.shape[1] <= _WIDEST
    )


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether Triton is there, and the device one that multiplies bfloat16."""
    return generation(device) >= 8 and importlib.util.find_spec("triton") is not None


@functools.cache
def generation(device: torch.device) -> int:
    """First number of a card's compute capability: 8 of an A100, 9 of an H100, 10 of a B200; 0 without a card."""
    # torch.accelerator's capabilities are a list of dtypes, without the generation that the kernels are compiled for.
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def own_precision(device: torch.device) -> AbstractContextManager[object]:
    """Inside, products keep the dtype of their operands, whatever autocast the caller has around it."""
    return torch.autocast(device.type, enabled=False)


def is_recorded(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured, to be replayed as it is."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def selected(device: torch.device) -> AbstractContextManager[None]:
    """Inside, Triton launches on this device; on a CPU nothing changes."""
    return torch.accelerator.device_index(None if device.type == "cpu" else device.index)


def streams(device: torch.device) -> ModuleType:
    """``Stream``, ``stream`` and ``current_stream``: a GPU's, or torch.cpu's, where each call is done at once."""
    return torch.get_device_module(device)


def host_side(parts: list[Tensor]) -> list[Tensor]:
    """Memory of the host through which rows go to a device and come back: a CPU's own, pinned for a GPU's."""
    if all(host_sees(part.device) for part in parts):
        return parts
    return [torch.empty_like(part, device="cpu", pin_memory=part.device.type != "cpu") for part in parts]


def default_keep_bytes(device: torch.device) -> int:
    """The memory that the probabilities may take by default: a sixteenth of a GPU's, 1 GiB of a host's."""
    if device.type == "cpu":
        return 1 << 30
    return torch.get_device_module(device).get_device_properties(device).total_memory // 16


def block_bytes(device: torch.device) -> int:
    """How large a block of rows is that torch's own operations take at once."""
    # On a CPU every thread has a cache of its own, and too small a block is not worth waking them.
    return _BLOCK_BYTES_CPU * torch.get_num_threads() if device.type == "cpu" else _BLOCK_BYTES_GPU
