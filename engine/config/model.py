"""What is trained: the backbone, and the head with its objective."""

import dataclasses
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, model_validator

from ...partial_fc import objectives
from .section import Count, CountOrZero, Rate, Section


class Backbone(Section):
    name: str = "mobilefacenet"
    """A registered network: see docs/backbones.md."""
    embedding_dim: Count = 512
    """Length of the embedding, D."""
    options: dict[str, Any] = {}
    """Options of that network, such as width or norm."""
    sync_bn: bool = False
    """BatchNorm statistics over all ranks (GPU only)."""
    channels_last: bool | None = None
    """NHWC memory format: faster convolutions on GPUs, and with bf16 on CPUs; when absent, on GPUs and not on a CPU."""
    compile: bool = False
    """torch.compile the network."""
    static_graph: bool = False
    """The network does the same in every step, so DistributedDataParallel plans its exchange once."""
    payload_dtype: Literal["bf16"] | None = None
    """What the backbone's gradients travel in between the ranks; their own type when absent."""


class Objective(BaseModel):
    """``name`` and the parameters of that objective (``pfc.partial_fc.objectives``)."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str

    @model_validator(mode="before")
    @classmethod
    def _with_defaults(cls, tree: Any) -> Any:
        """Fills in the objective's own defaults, so that the written configuration says everything."""
        if isinstance(tree, dict):
            parameters = {"name": "d_softmax", **tree}
            name = parameters.pop("name")
            return {"name": name, **dataclasses.asdict(objectives.build(name, **parameters))}
        return tree

    def build(self) -> objectives.Objective:
        """The objective itself; ValueError names a wrong parameter, its value and what is allowed."""
        return objectives.build(self.name, **(self.model_extra or {}))


class Head(Section):
    objective: Objective = Objective.model_validate({})
    """What is minimised: see docs/objectives.md."""
    num_classes: Count | None = None
    """Number of identities, C; that of the data set when absent, and equal to it when given."""
    sample_rate: Rate = 1.0
    """Share of the classes that each step uses (D-Softmax-K, Partial FC)."""
    sample_rate_schedule: list[list[float]] = []
    """Later rates: [[0.8, 0.5], [0.9, 1.0]] uses half of the classes from 80 % of the run on, all from 90 % on."""
    batch_rate: Rate = 1.0
    """Share of the batch that meets the negatives (D-Softmax-B)."""
    center_dtype: Literal["float32"] = "float32"
    """How the centers are stored."""
    payload_dtype: Literal["float32", "bf16"] | None = None
    """What embeddings and their gradients travel in between the ranks; their own types when absent."""
    products: Literal["float32", "tf32", "bf16"] | None = None
    """What the head's matrix products are made in; bf16 with precision: bf16, else float32, when absent. tf32 and bf16
    use a GPU's tensor cores: docs/performance.md has their error."""
    keep_mib: CountOrZero | None = None
    """Memory in MiB that the probabilities of a step may take on a rank until the centers are updated; where they need
    more they are computed again, at the cost of one more matrix product. A sixteenth of a GPU's memory, or 1024 on a
    CPU, when absent."""

    @model_validator(mode="after")
    def _rates_in_order(self) -> "Head":
        last = -1.0
        for entry in self.sample_rate_schedule:
            if len(entry) != 2 or not last < entry[0] < 1 or entry[0] < 0 or not 0 < entry[1] <= 1:
                raise ValueError(
                    f"sample_rate_schedule: found {entry}, allowed: [share of the run in [0, 1), rate in (0, 1]], "
                    "shares rising"
                )
            last = entry[0]
        return self
