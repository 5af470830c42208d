"""What depends on the device, in one place: the rest of the engine makes the same calls on a CPU and on a GPU.

docs/devices.md names every line here that only a GPU reaches, and the test that stands for it.
"""

import os
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..data.errors import UsageError

Precision = Literal["float32", "bf16", "fp16"]
_AUTOCAST = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def local_device(local_rank: int | None = None) -> torch.device:
    """A rank's device: the GPU of its number on this machine, or the CPU where there is no GPU.

    Args:
        local_rank: its number; by default this process's, LOCAL_RANK.

    Raises:
        UsageError: there are more ranks than GPUs.
    """
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank is None:
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if local_rank >= count:
        raise UsageError(
            f"rank {local_rank} of this machine has no GPU: PyTorch finds {count}; start at most {count} rank(s) here, "
            "or set LOCAL_RANK=0 where each rank sees only a GPU of its own (torchrun: --virtual-local-rank), or "
            "CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, local_rank)


def use(device: torch.device) -> None:
    """Makes it this thread's current device; every thread that touches a GPU has to."""
    torch.get_device_module(device).set_device(device)


def pci_address(device: torch.device) -> str | None:
    """Where the kernel has a GPU in its list of PCI devices, as 0000:3b:00.0; None of what is no NVIDIA or AMD GPU."""
    if device.type != "cuda":
        return None
    about = torch.cuda.get_device_properties(device)
    return f"{about.pci_domain_id:04x}:{about.pci_bus_id:02x}:{about.pci_device_id:02x}.0"


def backend(device: torch.device) -> str:
    """The process group's: what lies on the host always goes over gloo, so that no device is waited for."""
    if device.type == "cpu":
        return "gloo"
    return f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was given."""
    torch.get_device_module(device).synchronize(device)


def host_buffer(tensor: Tensor) -> Tensor:
    """An empty tensor like ``tensor`` on the host, pinned where that makes copies from a GPU asynchronous."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.device.type != "cpu")


def rng_states(device: torch.device) -> dict[str, Tensor]:
    """The state of this rank's random generators, by the kind of device they are for."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def set_rng_state(kind: str, state: Tensor, device: torch.device) -> None:
    """Sets one of ``rng_states``; that of another kind of device than this rank's is left out."""
    if kind == "cpu":
        torch.set_rng_state(state)
    elif kind == device.type:
        torch.get_device_module(device).set_rng_state(state, device)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The arithmetic of the backbone's forward pass."""
    dtype = _AUTOCAST[precision]
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def channels_last(wanted: bool | None, device: torch.device) -> bool:
    """Whether images and convolutions are stored as NHWC; where nobody said, on GPUs, whose tensor cores want it."""
    return device.type != "cpu" if wanted is None else wanted


def consult_every(wanted: int | None, device: torch.device) -> int:
    """Steps between the ranks' questions to each other; where nobody said, 10 on a GPU, whose host runs ahead."""
    return wanted or (1 if device.type == "cpu" else 10)
