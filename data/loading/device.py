"""All device-dependent code of loading: where DALI decodes, and how a batch gets to where it is used.

A CPU takes the same calls as a GPU; only this module knows what differs between the two.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import UsageError

Place = Literal["cpu", "gpu"]
CPU = torch.device("cpu")


def decoding_device(place: Place, device: torch.device) -> torch.device:
    """Where DALI works for a loader whose batches end on ``device``. UsageError where there is no GPU to decode on.

    DALI knows NVIDIA's GPUs alone, so this asks for "cuda" and not for any accelerator.
    """
    if place == "gpu" and device.type != "cuda":
        raise UsageError(
            f"data.decode: gpu needs an NVIDIA GPU, this run computes on {device.type}: write data.decode: cpu"
        )
    return device if place == "gpu" else CPU


def device_id(decoder: torch.device) -> int | None:
    """DALI's number of the device that it works on; None without a GPU, and then it needs no driver."""
    if decoder.type == "cpu":
        return None
    return torch.accelerator.current_device_index() if decoder.index is None else decoder.index


def decoder_options(decoder: torch.device) -> dict[str, Any]:
    """Options of ``fn.decoders.image`` with which both devices give nearly the same pictures."""
    return {
        "device": "cpu" if decoder.type == "cpu" else "mixed",  # begins on the CPU and ends on the GPU
        # The CPU always interpolates chroma between its samples ("fancy"); a GPU repeats them by default.
        "jpeg_fancy_upsampling": True,
        # All JPEGs that a card's decoder in hardware can read, where it has one. DALI's default gives it 65 % of each
        # batch: which decoder rounds a picture would depend on the picture's place there, so on the size of the batch.
        "hw_decoder_load": 1.0,
    }


def takes_rows(decoder: torch.device) -> bool:
    """Whether images may be given in the rows of a matrix, with zeros behind the shorter ones.

    What a GPU's decoders make of those zeros has not been tried.
    """
    return decoder.type == "cpu"


def output_stream(decoder: torch.device) -> Any:
    """The stream on which DALI's results are used; None on the CPU."""
    # torch.accelerator's streams do not have the attribute by which DALI knows a stream, ``cuda_stream``.
    return None if decoder.type == "cpu" else torch.cuda.current_stream(decoder)


def owned(tensor: Tensor, decoder: torch.device) -> Tensor:
    """A view of DALI's output as the caller's own tensor."""
    # The view keeps DALI's buffer alive, and the next run uses another one. On a GPU that is not enough: DALI's
    # allocator does not know which other streams of torch still read the memory when the tensor goes.
    return tensor if decoder.type == "cpu" else tensor.clone()


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``: itself where it is there, else copied while this thread goes on."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def wait_for(device: torch.device) -> None:
    """Returns when the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
