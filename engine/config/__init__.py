"""The configuration of a run: YAML in, a validated and frozen object out.

Every section of the file is one small class, with a line under every field. Unknown keys, wrong types and impossible
values are refused with the path of the key, what was found and what is allowed.
"""

from .loading import load_config, parse_config
from .sections import (
    Adagrad,
    AdamW,
    BalancedSampling,
    BlockSampling,
    Config,
    Generated,
    Objective,
    Optimizer,
    Spike,
)

__all__ = [
    "Adagrad",
    "AdamW",
    "BalancedSampling",
    "BlockSampling",
    "Config",
    "Generated",
    "Objective",
    "Optimizer",
    "Spike",
    "load_config",
    "parse_config",
]
