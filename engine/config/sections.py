"""All that a person can write into a configuration: one class a section, a line under every field."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

from ...data.loading.augment import Augment
from ...partial_fc import objectives

Rate = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=8)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Source(Section):
    """One of several training sets."""

    path: str
    """A packed data set (folder or .rec)."""
    weight: Positive = 1.0
    """How many times an epoch goes through it."""


class Generated(Section):
    """A training set that is computed while it is read, from a seed: see docs/data.md."""

    generated: Count
    """Number of identities."""
    active: Count | None = None
    """How many of them have images, spread evenly over all; each when absent. The others are negatives only."""
    images_per_identity: Count = 20
    """Different images of each active identity."""
    image_size: Annotated[list[Side], Field(min_length=2, max_length=2)] = [32, 32]
    """Height and width."""
    seed: CountOrZero = 0
    """Of the images; another seed, other identities."""

    @model_validator(mode="after")
    def _active_of_all(self) -> "Generated":
        if self.active is not None and self.active > self.generated:
            raise ValueError(f"active ({self.active}) is more than generated ({self.generated}), the identities")
        return self


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
    parts: Count = 1
    """Parts of the images that are read apart: as many as machines, and each reads one part alone."""

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


def _kind_of_source(value: Any) -> str:
    if isinstance(value, Generated) or (isinstance(value, dict) and "path" not in value):
        return "generated"
    return "many" if isinstance(value, list) else "one"


Sources = Annotated[
    list[Annotated[Source, BeforeValidator(lambda v: {"path": v} if isinstance(v, str) else v)]], Field(min_length=1)
]


class RemoteCache(Section):
    """Where what is read of remote training sets is kept, on a disk of this machine: see docs/data.md."""

    folder: str | None = None
    """pfc/remote in the user's cache folder when absent."""
    gigabytes: Annotated[float, Field(gt=0, lt=1e9)] = 100.0
    """The most that parts of shards take there, of all training sets together."""
    timeout: Positive = 60.0
    """Seconds without a byte after which an answer has failed; one of 16 MiB has failed after five times that."""
    attempts: Count = 5
    """Of reading something, before the run ends."""


class Data(Section):
    train: Annotated[
        Annotated[str, Tag("one")] | Annotated[Sources, Tag("many")] | Annotated[Generated, Tag("generated")],
        Discriminator(_kind_of_source),
    ]
    """A packed data set (folder, .rec, or an address such as s3://bucket/folder), or a list of them: paths, or {path,
    weight}. Labels are offset set by set. Or {generated: C, ...}: images of C identities that are computed."""
    cache: RemoteCache = RemoteCache()
    """Of training sets that are not on this machine's disks."""
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
        """The packed data sets; [] of a generated one."""
        if isinstance(self.train, Generated):
            return []
        return [Source(path=self.train)] if isinstance(self.train, str) else self.train

    @model_validator(mode="before")
    @classmethod
    def _order_by_name(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and isinstance(tree.get("order"), str):
            return {**tree, "order": {"name": tree["order"]}}
        return tree

    @model_validator(mode="after")
    def _what_needs_files(self) -> "Data":
        if isinstance(self.train, Generated):
            size = self.train.image_size
            for refused, given in (
                ("augment", self.augment.active),
                ("decode: gpu", self.decode == "gpu"),
                ("order: balanced", isinstance(self.order, BalancedSampling)),
                (f"an image_size other than the generated one, {size}", self.image_size not in (None, size)),
            ):
                if given:
                    raise ValueError(f"{refused} is for images in files: leave it out, or pack such images (pfc pack)")
        return self


class Backbone(Section):
    name: str = "mobilefacenet"
    """A registered network, timm/NAME, or MODULE:FUNCTION of your own: see docs/backbones.md."""
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
    recompute: bool = False
    """Keep the input of each block alone, and compute its activations again in the backward pass: less memory, a third
    more time (activation checkpointing)."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, such as 0.999, which is then what is evaluated and exported; none when
    absent."""

    @model_validator(mode="after")
    def _compiled_alone(self) -> "Backbone":
        if self.recompute and self.compile:
            raise ValueError("recompute and compile: torch.compile decides itself what it keeps; give one of them")
        return self


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


class ClassWeights(Section):
    """Of the identities' losses, given or by their numbers of images; one of the two."""

    file: str | None = None
    """A .npy file of one number for each identity, in the order of the labels: finite, not negative."""
    frequency: Annotated[float, Field(gt=0, le=1)] | None = None
    """β: an identity of n images weighs n^−β, times what makes the mean over all images 1. 1 gives every identity the
    same weight in the long run, 0.5 is between that and none."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "ClassWeights":
        if (self.file is None) == (self.frequency is None):
            raise ValueError("give file or frequency, one of the two")
        return self


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
    sub_centers: Annotated[int, Field(ge=1, le=64)] = 1
    """Centers of each identity, of which the nearest one counts: images of another kind, or of another person under
    this name, get one of their own (Sub-center ArcFace)."""
    class_weights: ClassWeights | None = None
    """How much the losses of each identity's images weigh; all alike when absent."""
    center_dtype: Literal["float32", "bf16"] = "float32"
    """How the centers and their optimizer's state are stored; bf16 is rounded stochastically."""
    storage: Literal["device", "host", "file"] = "device"
    """Where the centers and their optimizer's state are stored: with the head, in (pinned) host memory, or in a file on
    a local disk, from which each step copies its rows."""
    storage_dir: str | None = None
    """Folder of the file of storage: file, on a local SSD; the run's own folder when absent."""
    payload_dtype: Literal["float32", "bf16"] | None = None
    """What embeddings and their gradients travel in between the ranks; their own types when absent."""
    products: Literal["float32", "tf32", "bf16"] | None = None
    """What the head's matrix products are made in; bf16 with precision: bf16, else float32, when absent. tf32 and bf16
    use a GPU's tensor cores: docs/performance.md has their error."""
    keep_mib: CountOrZero | None = None
    """Memory in MiB that the probabilities of a step may take on a rank until the centers are updated; where they need
    more they are recomputed, at the cost of one more matrix product. A sixteenth of a GPU's memory, or 1024 on a
    CPU, when absent."""

    @property
    def stored_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.center_dtype == "bf16" else torch.float32

    @model_validator(mode="after")
    def _folder_of_a_file(self) -> "Head":
        if self.storage_dir is not None and self.storage != "file":
            raise ValueError(f"storage_dir is the folder of storage: file, and storage is {self.storage}: leave it out")
        return self

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


class SGD(Section):
    """Of the backbone (``sgd``, torch.optim.SGD) or of the centers (``row_sgd``, pfc.partial_fc.RowSGD)."""

    name: Literal["sgd", "row_sgd"]
    lr: Positive = 0.1
    """Peak learning rate."""
    momentum: Fraction = 0.9
    weight_decay: NonNegative = 5e-4
    nesterov: bool = False
    dense: bool = False
    """Of the centers: step those too that were not sampled, by momentum and weight decay alone."""

    @model_validator(mode="after")
    def _nesterov(self) -> "SGD":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs momentum > 0")
        return self


class AdamW(Section):
    """Of the backbone (``adamw``) or of the centers (``row_adamw``)."""

    name: Literal["adamw", "row_adamw"]
    lr: Positive = 1e-3
    """Peak learning rate."""
    betas: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    eps: Positive = 1e-8
    weight_decay: NonNegative = 1e-2
    dense: bool = False
    """Of the centers: step those too that were not sampled, by their moments and weight decay alone."""


class Adagrad(Section):
    """Of the centers: one number of state a row (pfc.partial_fc.RowAdagrad)."""

    name: Literal["row_adagrad"]
    lr: Positive = 1e-2
    """Peak learning rate."""
    eps: Positive = 1e-10
    weight_decay: NonNegative = 0.0


class Group(Section):
    """Parameters of the backbone that are trained in another way. Of several groups that say something of a parameter,
    the last one counts, key by key."""

    names: str | Annotated[list[str], Field(min_length=1)] = "*"
    """Of the parameters, * standing for any part: "blocks.0.*", or a list."""
    vectors: bool | None = None
    """true: of them only biases, and the weights of norms and PReLUs; false: only the others; all when absent."""
    lr: NonNegative | None = None
    """Share of optimizer.backbone.lr."""
    layer_decay: Rate | None = None
    """By how much less the rate is in each block than in the one behind it."""
    weight_decay: NonNegative | None = None
    """In place of optimizer.backbone.weight_decay."""
    frozen_until: CountOrZero | Literal["end"] | None = None
    """Not trained before this step."""


class Optimizer(Section):
    backbone: Annotated[SGD | AdamW, Field(discriminator="name")] = SGD(name="sgd")
    head: Annotated[SGD | AdamW | Adagrad, Field(discriminator="name")] = SGD(name="row_sgd")
    groups: list[Group] = []
    """Parameters of the backbone that are trained in another way: see docs/backbones.md."""
    accumulate: Count = 1
    """Micro-batches per step; their gradients are averaged."""
    clip_norm: Positive | None = None
    """Largest norm of the backbone's gradient; no clipping when absent."""
    max_skipped_in_a_row: Count = 20
    """Steps in a row that may be skipped because the loss or a gradient is not finite; then the run ends with a
    diagnosis. In fp16 16 more, as many as the search for the loss's scale can take."""

    @model_validator(mode="before")
    @classmethod
    def _default_names(cls, tree: Any) -> Any:
        """optimizer.backbone.lr=0.05 alone means SGD's."""
        if isinstance(tree, dict):
            for part, name in (("backbone", "sgd"), ("head", "row_sgd")):
                if isinstance(tree.get(part), dict):
                    tree = {**tree, part: {"name": name, **tree[part]}}
        return tree

    @model_validator(mode="after")
    def _each_its_own(self) -> "Optimizer":
        if self.backbone.name.startswith("row_"):
            raise ValueError(f"backbone.name is {self.backbone.name!r}, allowed: sgd, adamw")
        if not self.head.name.startswith("row_"):
            raise ValueError(f"head.name is {self.head.name!r}, allowed: row_sgd, row_adamw, row_adagrad")
        if self.backbone.dense:
            raise ValueError("backbone.dense: the backbone's steps are dense anyway: leave it out")
        return self


class Schedule(Section):
    steps: Count | None = None
    """Number of optimizer steps."""
    epochs: Positive | None = None
    """Number of passes over the data set; exactly one of steps and epochs is given."""
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up; the first one runs at lr / warmup_steps."""
    name: Literal["polynomial", "cosine", "constant"] = "polynomial"
    """How the learning rate falls after the warm-up."""
    power: Positive = 2.0
    """Exponent of the polynomial."""
    final: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the peak learning rate that is left at the end."""

    @model_validator(mode="after")
    def _one_length(self) -> "Schedule":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        if self.steps is not None and self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) is more than steps ({self.steps})")
        return self


class Spike(Section):
    """What to do about a loss far above those before it."""

    factor: Annotated[float, Field(gt=1)] = 3.0
    """How many times the median of the last losses a spike is."""
    window: Annotated[int, Field(ge=2)] = 100
    """How many these are; nothing is a spike before there are so many."""
    rollback: bool = True
    """Go back to the last checkpoint, and on with the data that follow the spike; else it is only told."""
    max_rollbacks: Count = 3
    """So many in a run; at one more spike it ends."""


class Evaluation(Section):
    every_steps: Count = 500
    """Steps between evaluations; the first step and the last are always evaluated."""
    pairs: list[str] = []
    """Verification sets (.bin)."""
    sets: list[str] = []
    """Protocols (tables, see docs/evaluation.md)."""
    most_seconds: Positive | None = None
    """A set of ``sets`` that took longer is left out until the last step."""
    batch_size: Count = 128
    """Images per rank in one forward pass."""
    flip: bool = True
    """Add the mirror image's embedding; both accuracies are reported, this one leads."""


class BestCheckpoint(Section):
    """The checkpoint that stays because it measured best."""

    metric: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]*$")] = "accuracy"
    """A field of evaluation.jsonl."""
    set: str | None = None
    """The set, by its file's name without the ending; the first of evaluation.pairs and evaluation.sets when absent."""
    mode: Literal["max", "min"] | None = None
    """Which is best, the largest or the smallest; the smallest of eer and min_dcf, else the largest, when absent."""


class Checkpoint(Section):
    every_steps: Count = 500
    """Steps between checkpoints; the last step is always saved."""
    every_minutes: Positive | None = None
    """Minutes between checkpoints, by the first rank's clock, besides those of every_steps."""
    keep: Count = 3
    """How many of the latest stay."""
    best: BestCheckpoint | None = None
    """Keep the best one too, saved as soon as it is measured."""
    asynchronous: bool = False
    """Copy the state into host memory and write it while training goes on."""
    check_labels: bool = True
    """Refuse to go on with the centers of other identities than the data set's, where both are known by name."""


class Logger(BaseModel):
    """``name`` of a logger, and its options."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    name: str


class Log(Section):
    every_steps: Count = 20
    """Steps between lines of metrics.jsonl and of the progress."""
    loggers: list[Annotated[Logger, BeforeValidator(lambda v: {"name": v} if isinstance(v, str) else v)]] = [
        Logger(name="tensorboard")
    ]
    """Who else hears of the run: tensorboard, wandb, mlflow, or MODULE:CLASS of your own: see docs/logging.md."""
    profile: Annotated[list[Count], Field(min_length=2, max_length=2)] | None = None
    """First and last step to measure operation by operation, with torch.profiler; none when absent."""

    @model_validator(mode="before")
    @classmethod
    def _tensorboard_switch(cls, tree: Any) -> Any:
        """``tensorboard: false`` of older configurations."""
        if isinstance(tree, dict) and isinstance(tree.get("tensorboard"), bool):
            tree = dict(tree)
            if not tree.pop("tensorboard"):
                loggers = tree.get("loggers", [])
                if isinstance(loggers, list):
                    tree["loggers"] = [one for one in loggers if one != "tensorboard"]
        return tree

    @model_validator(mode="after")
    def _first_to_last(self) -> "Log":
        if self.profile is not None and self.profile[0] > self.profile[1]:
            raise ValueError(f"profile: found {self.profile}, allowed: [first step, last step]")
        return self


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "run"
    """Name of the run: the folder that it writes, under ``dir``."""
    dir: str = "runs"
    """Folder of all runs."""
    seed: CountOrZero = 0
    """Seed of everything random: centers, weights, the order of samples, class samples, flips."""
    timeout_seconds: Annotated[float, Field(ge=1)] = 600.0
    """A run that stands still for so long ends, and says which rank everyone waited for: see docs/failures.md."""
    bind_to_cores: bool = True
    """Keep each rank on the cores near its GPU, on machines with several NUMA nodes: see docs/devices.md."""
    code: str | None = None
    """Folder of the modules that this configuration names (MODULE:NAME); its own when absent."""
    consult_every_steps: Count | None = None
    """Steps between the ranks' questions to each other whether to stop, save or go back; each waits for the slowest. 1
    on a CPU, 10 on GPUs, when absent."""

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


class Init(Section):
    """What a new run begins with; a run that goes on from a checkpoint of its own has begun already."""

    path: str | None = None
    """A run, a checkpoint, or a file of the backbone's weights (.safetensors, or a state_dict in .pt)."""
    partial: bool = False
    """Take of the backbone what fits by name and shape, and tell what does not; else all of it must fit."""
    centers: Literal["new", "keep", "by_name"] = "new"
    """The centers: new ones; those of the same identities; or those that the names of the identities lead to."""

    @model_validator(mode="after")
    def _centers_of_something(self) -> "Init":
        if self.path is None and self.centers != "new":
            raise ValueError(f"centers is {self.centers!r}, which needs path: the run or checkpoint that has them")
        return self


class Config(Section):
    """One run, whole."""

    run: Run = Run()
    init: Init = Init()
    data: Data
    backbone: Backbone = Backbone()
    head: Head = Head()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Arithmetic of the backbone: bf16 and fp16 under autocast, fp16 with a GradScaler (GPU only)."""
    spike: Spike | None = None
    """A loss far above those before it; nothing is done about it when absent."""
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @model_validator(mode="after")
    def _one_exchange_a_step(self) -> "Config":
        if self.backbone.static_graph and self.optimizer.accumulate > 1:
            raise ValueError("backbone.static_graph needs optimizer.accumulate: 1 (DistributedDataParallel's own rule)")
        return self

    @model_validator(mode="after")
    def _one_copy(self) -> "Config":
        if getattr(self.optimizer.head, "dense", False) and self.head.storage != "device":
            raise ValueError(
                f"optimizer.head.dense passes over all centers in every step, which head.storage: {self.head.storage} "
                "avoids: take one of the two"
            )
        if self.checkpoint.asynchronous and self.head.storage != "device":
            raise ValueError(
                f"checkpoint.asynchronous would hold a second copy of the centers, too large for head.storage: "
                f"{self.head.storage}; leave it false: the checkpoint is streamed from there"
            )
        return self

    @property
    def names_of_code(self) -> list[str]:
        """What may be MODULE:NAME."""
        return [self.backbone.name, *(logger.name for logger in self.log.loggers)]

    def images_per_step(self, world_size: int) -> int:
        """Images of all ranks in one optimizer step."""
        return self.data.batch_size * self.optimizer.accumulate * world_size

    @property
    def max_skipped_in_a_row(self) -> int:
        """Of ``optimizer``, with a lower limit for fp16: from 65536 down to 1 the loss's scale is halved 16 times."""
        return self.optimizer.max_skipped_in_a_row + (16 if self.precision == "fp16" else 0)

    def to_yaml(self) -> str:
        """The configuration with every default filled in."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)
