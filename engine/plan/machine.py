"""What a rank has: memory, and the rates of its products, its memory and its links."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ...data.errors import UsageError

GB = 10**9

# Of what the data sheets say, the share that an H100 reached (787 of 989 TFLOP/s, 3.02 of 3.35 TB/s:
# docs/performance.md); taken for every card.
_PRODUCTS_REACHED, _BANDWIDTH_REACHED, _LINK_REACHED = 0.8, 0.9, 0.8


@dataclass(frozen=True)
class Machine:
    """One rank's share of a machine, and how ranks are joined. Bytes, bytes a second, operations a second.

    Attributes:
        name: as it is shown.
        gpu: whether a rank computes on a GPU. On a CPU all memory is the host's.
        memory: of a GPU; a CPU has none of its own, 0.
        host_memory: of one machine, which its ranks share.
        products: precision ("float32", "tf32", "bf16", "fp16") → operations a second of matrix products.
        bandwidth: of the rank's memory, bytes read and written added up; scattered: the same of rows at random
            places.
        convolutions, elementwise: operations a second of the backbone's convolutions, and bytes a second of its other
            operations; those of products and of memory when None.
        exponential, rounding: seconds of one probability, and of one number that is stored in bfloat16, where they are
            passes of their own; a GPU makes them while memory is read.
        fused: whether the head's fused kernels run there (compute capability 8.0).
        host_link: between a GPU and the host's memory, each way; host_copy: at which the host's cores copy rows of one
            rank between its memory and what the link reads and writes.
        disk: of one machine, read and written added up; disk_space: bytes that are free there.
        inside: between two ranks of one machine, each way; network: of machines, for each rank.
        per_node: ranks of one machine.
        overhead: seconds of a step of the head whatever its size: launches, Python, waiting for the others.
        launch: seconds that the host needs for one operation of the backbone on a GPU.
        latency: seconds of a small message between ranks.
        threads: of a rank on a CPU.
    """

    name: str
    gpu: bool
    memory: float
    host_memory: float
    products: Mapping[str, float]
    bandwidth: float
    scattered: float
    convolutions: float | None = None
    elementwise: float | None = None
    exponential: float = 0.0
    rounding: float = 0.0
    fused: bool = True
    host_link: float = 25 * GB
    host_copy: float = 20 * GB
    disk: float = 3 * GB
    disk_space: float = math.inf
    inside: float = 20 * GB
    network: float = 25 * GB
    per_node: int = 8
    overhead: float = 5e-3
    launch: float = 6e-6
    latency: float = 20e-6
    threads: int = 1

    def ranks_here(self, ranks: int) -> int:
        """How many of so many ranks one machine has."""
        return min(ranks, self.per_node)

    def mean(self, other: "Machine") -> "Machine":
        """Between two measurements of one machine."""
        products = {name: (rate + other.products[name]) / 2 for name, rate in self.products.items()}
        rates = ("bandwidth", "scattered", "convolutions", "elementwise", "exponential", "rounding", "overhead")
        return replace(
            self, products=products, **{name: (getattr(self, name) + getattr(other, name)) / 2 for name in rates}
        )

    def to_dict(self) -> dict[str, object]:
        space = None if self.disk_space == math.inf else self.disk_space  # JSON has no infinity
        return {**vars(self), "products": dict(self.products), "disk_space": space}


@dataclass(frozen=True)
class Card:
    """A GPU as its vendor's data sheet has it: GB, GB/s, and dense TFLOP/s. A GB counts as 10⁹ bytes, so each has a
    little more than that.

    Attributes:
        link: NVLink, or PCIe where there is none, each way.
        host: PCIe to the host, each way.
        fused: compute capability 8.0 or later.
    """

    memory: int
    bandwidth: int
    products: Mapping[str, float]
    link: float
    host: float
    fused: bool = field(default=True)


CARDS: Mapping[str, Card] = {
    "v100-32": Card(32, 900, {"float32": 15.7, "fp16": 125.0}, 150, 16, fused=False),
    "a100-40": Card(40, 1555, {"float32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}, 300, 32),
    "a100-80": Card(80, 2039, {"float32": 19.5, "tf32": 156.0, "bf16": 312.0, "fp16": 312.0}, 300, 32),
    "h100-80": Card(80, 3350, {"float32": 67.0, "tf32": 494.5, "bf16": 989.0, "fp16": 989.0}, 450, 64),
    "h200": Card(141, 4800, {"float32": 67.0, "tf32": 494.5, "bf16": 989.0, "fp16": 989.0}, 450, 64),
    "rtx-4090": Card(24, 1008, {"float32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2}, 32, 32),
    "l40s": Card(48, 864, {"float32": 91.6, "tf32": 183.0, "bf16": 362.0, "fp16": 362.0}, 32, 32),
}


def card_machine(name: str) -> Machine:
    """A machine of eight of these cards and 2 TB.

    Raises:
        UsageError: no such card.
    """
    if name not in CARDS:
        raise UsageError(f"--card {name}: known are {', '.join(CARDS)}; or give --gpu-memory and --bandwidth")
    card = CARDS[name]
    return Machine(
        name=name,
        gpu=True,
        memory=card.memory * GB,
        host_memory=2000 * GB,
        products={key: rate * 1e12 * _PRODUCTS_REACHED for key, rate in card.products.items()},
        bandwidth=card.bandwidth * GB * _BANDWIDTH_REACHED,
        scattered=card.bandwidth * GB * _BANDWIDTH_REACHED,
        fused=card.fused,
        host_link=card.host * GB * _LINK_REACHED,
        inside=card.link * GB * _LINK_REACHED,
    )
