"""The data of a run: which sets, in which order, and what is done to the pictures."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator

from ...data.loading.augment import Augment
from .section import Count, Positive, Section, Side


class Source(Section):
    """One of several training sets."""

    path: str
    """A packed data set (folder or .rec)."""
    weight: Positive = 1.0
    """How many times an epoch goes through it."""


class GlobalSampling(Section):
    """A random permutation of all images for every epoch."""

    name: Literal["global"] = "global"


class BlockSampling(Section):
    """For slow disks: blocks of neighbouring images in random order, shuffled within a window."""

    name: Literal["blocks"]
    block_size: Count = 1024
    """Images of a block."""
    window: Count = 32768
    """Images that are shuffled among themselves."""

    @model_validator(mode="after")
    def _window_of_blocks(self) -> "BlockSampling":
        if self.window < self.block_size:
            raise ValueError(f"window ({self.window}) is less than block_size ({self.block_size})")
        return self


class BalancedSampling(Section):
    """Batches of P identities with K images each."""

    name: Literal["balanced"]
    identities: Count
    """P; P · K is the global batch."""
    images: Annotated[int, Field(ge=2)]
    """K."""


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


Sources = Annotated[
    list[Annotated[Source, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v)]], Field(min_length=1)
]


class Data(Section):
    train: Annotated[Annotated[str, Tag("one")] | Annotated[Sources, Tag("many")], Discriminator(_one_or_many)]
    """A packed data set (folder or .rec), or a list of them: paths, or {path, weight}. Labels are offset set by set."""
    order: Annotated[GlobalSampling | BlockSampling | BalancedSampling, Field(discriminator="name")] = GlobalSampling()
    """In which order the images come; a name alone takes that order's defaults."""
    remainder: Literal["carry", "drop"] = "carry"
    """The rest of an epoch that does not fill a global batch: goes on into the next epoch, or is left out."""
    batch_size: Count = 64
    """Images per rank and step (per micro-batch when gradients are accumulated)."""
    image_size: Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    """Height and width of the network's input; that of the data set when absent."""
    flip: bool = True
    """Mirror half of the images, left to right."""
    augment: Augment = Augment()
    """What else is done to the pictures: see docs/data.md."""
    max_damaged: Annotated[float, Field(ge=0, le=1)] = 0.02
    """Share of damaged images that are replaced by good ones; more end the run."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where pictures are decoded and augmented; from the CPU, finished batches are copied to the GPU."""
    threads: Count | None = None
    """Decoding threads per rank; by default this machine's cores shared among its ranks, at most 8 for each."""

    @property
    def sources(self) -> list[Source]:
        return [Source(path=self.train)] if isinstance(self.train, str) else self.train

    @model_validator(mode="before")
    @classmethod
    def _order_by_name(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("order"), str):
            return {**tree, "order": {"name": tree["order"]}}
        return tree
