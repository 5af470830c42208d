"""The configuration of a run: YAML in, a validated and frozen object out.

Every section of the file is one small class below, with a line under every field. Unknown keys, wrong types and
impossible values are refused with the path of the key, what was found and what is allowed.
"""

import dataclasses
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..data.errors import UsageError
from ..partial_fc import objectives
from .config_errors import explain, shown

Rate = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=8)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Run(Section):
    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = "run"
    """Name of the run: the folder that it writes, under ``dir``."""
    dir: str = "runs"
    """Folder of all runs."""
    seed: CountOrZero = 0
    """Seed of everything random: centers, weights, the order of samples, class samples, flips."""

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


class Data(Section):
    train: str
    """A packed data set (folder or .rec)."""
    batch_size: Count = 64
    """Images per rank and step (per micro-batch when gradients are accumulated)."""
    image_size: Annotated[list[Side], Field(min_length=2, max_length=2)] | None = None
    """Height and width of the network's input; that of the data set when absent."""
    flip: bool = True
    """Mirror half of the images, left to right."""
    threads: Count = 2
    """Decoding threads per rank."""


class Backbone(Section):
    name: str = "mobilefacenet"
    """A registered network: see docs/backbones.md."""
    embedding_dim: Count = 512
    """Length of the embedding, D."""
    options: dict[str, Any] = {}
    """Options of that network, such as width or norm."""
    sync_bn: bool = False
    """BatchNorm statistics over all ranks (GPU only)."""
    channels_last: bool = False
    """NHWC memory format: faster convolutions on GPUs, and with bf16 on CPUs."""
    compile: bool = False
    """torch.compile the network."""


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


class Adagrad(Section):
    """Of the centers: one number of state a row (pfc.partial_fc.RowAdagrad)."""

    name: Literal["row_adagrad"]
    lr: Positive = 1e-2
    """Peak learning rate."""
    eps: Positive = 1e-10
    weight_decay: NonNegative = 0.0


class Optimizer(Section):
    backbone: Annotated[SGD | AdamW, Field(discriminator="name")] = SGD(name="sgd")
    head: Annotated[SGD | AdamW | Adagrad, Field(discriminator="name")] = SGD(name="row_sgd")
    accumulate: Count = 1
    """Micro-batches per step; their gradients are averaged."""
    clip_norm: Positive | None = None
    """Largest norm of the backbone's gradient; no clipping when absent."""

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


class Evaluation(Section):
    every_steps: Count = 500
    """Steps between evaluations; the first step and the last are always evaluated."""
    pairs: list[str] = []
    """Verification sets (.bin)."""
    batch_size: Count = 128
    """Images per rank in one forward pass."""
    flip: bool = True
    """Add the mirror image's embedding; both accuracies are reported, this one leads."""


class Checkpoint(Section):
    every_steps: Count = 500
    """Steps between checkpoints; the last step is always saved."""
    keep: Count = 3
    """How many of the latest stay."""


class Log(Section):
    every_steps: Count = 20
    """Steps between lines of metrics.jsonl and of the progress."""
    tensorboard: bool = True
    """Write TensorBoard's files as well."""


class Config(Section):
    """One run, whole."""

    run: Run = Run()
    data: Data
    backbone: Backbone = Backbone()
    head: Head = Head()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    """Arithmetic of the backbone: bf16 and fp16 under autocast, fp16 with a GradScaler (GPU only)."""
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    def images_per_step(self, world_size: int) -> int:
        """Images of all ranks in one optimizer step."""
        return self.data.batch_size * self.optimizer.accumulate * world_size

    def to_yaml(self) -> str:
        """The configuration with every default filled in."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Reads a YAML file, applies ``key.sub=value`` overrides (values are YAML), and validates.

    Raises:
        UsageError: one line with the path of the key, what was found and what is allowed.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"{path}: no such configuration file")
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UsageError(f"{path}: expected sections such as data: and schedule:, found {shown(tree)}")
    for override in overrides or []:
        _apply(tree, override)
    return parse_config(tree, source=str(path))


def parse_config(tree: dict[str, Any], *, source: str = "configuration") -> Config:
    """Validates a tree of plain values; see ``load_config``."""
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first, *rest = [explain(detail, Config) for detail in error.errors()]
        more = f" (and {len(rest)} more)" if rest else ""
        raise UsageError(f"{source}: {first}{more}") from None


class _Loader(yaml.SafeLoader):
    """Reads 1e-3 as a number, as YAML 1.2 and everybody does; PyYAML's own rule wants 1.0e-3."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a SafeLoader


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise UsageError(f"override {override!r}: write it as key.sub=value, for example optimizer.backbone.lr=0.05")
    for name in names[:-1]:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise UsageError(f"override {override!r}: {name} is a value, not a section")
    try:
        tree[names[-1]] = _parse(value)
    except yaml.YAMLError as error:
        raise UsageError(f"override {override!r}: not valid YAML: {' '.join(str(error).split())}") from None
