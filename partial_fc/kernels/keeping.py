"""Whether a step's probabilities [B, K] are kept for the row update, or made again from one more matrix product."""

import torch


def default_keep_bytes(device: torch.device) -> int:
    """The memory that the probabilities may take where nobody said: a sixteenth of a GPU's, 1 GiB of a host's."""
    return torch.cuda.get_device_properties(device).total_memory // 16 if device.type == "cuda" else 1 << 30


def probability_bytes(batch: int, rows: int, compute_dtype: torch.dtype) -> int:
    """What the probabilities of ``batch`` samples by ``rows`` classes take in the products' dtype."""
    return batch * rows * compute_dtype.itemsize


def keeps_probabilities(batch: int, rows: int, compute_dtype: torch.dtype, keep_bytes: int) -> bool:
    """Whether they fit into ``keep_bytes``, and are kept."""
    return probability_bytes(batch, rows, compute_dtype) <= keep_bytes
