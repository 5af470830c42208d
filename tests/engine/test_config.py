from pathlib import Path

import pytest
import yaml

from pfc.data.errors import UsageError
from pfc.engine.config import Config, load_config, parse_config

MINIMAL = {"data": {"train": "somewhere"}, "schedule": {"steps": 10}}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    return path


def test_the_written_configuration_says_everything_and_reads_back(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file)
    resolved = tmp_path / "config.yaml"
    resolved.write_text(config.to_yaml())
    assert load_config(resolved) == config
    tree = yaml.safe_load(config.to_yaml())
    assert tree["head"]["objective"] == {"name": "d_softmax", "scale": 32.0, "filter": None, "stop": 0.9}
    assert tree["optimizer"]["head"]["momentum"] == 0.9


def test_the_example_of_the_contract_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "contract.yaml"
    path.write_text(
        """
run:        {name: glyphs, dir: runs, seed: 0}
data:       {train: work/glyphs/train, batch_size: 64}
backbone:   {name: mobilefacenet, embedding_dim: 512}
head:
  {objective: {name: d_softmax, scale: 32.0, stop: 0.9}, sample_rate: 0.1, batch_rate: 1.0, center_dtype: float32}
optimizer:  {backbone: {name: sgd, lr: 0.1, momentum: 0.9, weight_decay: 5.0e-4}, head: {name: row_sgd, lr: 0.1}}
schedule:   {steps: 20000, warmup_steps: 500, name: polynomial}
precision:  bf16
evaluation: {every_steps: 500, pairs: [work/glyphs/heldout.bin]}
checkpoint: {every_steps: 500, keep: 3}
"""
    )
    config = load_config(path)
    assert config.head.sample_rate == 0.1
    assert config.run.path == Path("runs/glyphs")
    assert config.head.objective.build().stop == 0.9  # type: ignore[attr-defined]


def test_overrides_replace_and_add(config_file: Path) -> None:
    config = load_config(
        config_file,
        [
            "schedule.steps=20",
            "optimizer.backbone.lr=1e-3",
            "head.objective={name: cosface, margin: 0.4}",
            "run.name=a-b.c",
        ],
    )
    assert config.schedule.steps == 20
    assert config.optimizer.backbone.lr == 1e-3
    assert config.optimizer.backbone.name == "sgd"
    assert config.head.objective.name == "cosface"
    assert config.run.name == "a-b.c"


def test_a_switch_of_optimizer_brings_its_own_defaults(config_file: Path) -> None:
    config = load_config(config_file, ["optimizer.head.name=row_adamw"])
    assert "betas" in config.optimizer.head.model_dump()
    assert "momentum" not in config.optimizer.head.model_dump()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("head.sample_rte=0.1", "head.sample_rte: unknown key; did you mean sample_rate? allowed here: objective,"),
        ("heads.sample_rate=0.1", "heads: unknown key; did you mean head?"),
        ("spike.factr=3", "spike.factr: unknown key; did you mean factor?"),
        ("head.class_weights.freq=1", "head.class_weights.freq: unknown key; did you mean frequency?"),
        ("head.class_weights={}", "head.class_weights: give file or frequency, one of the two"),
        ("head.sample_rate=2", "head.sample_rate: found 2, allowed: less than or equal to 1"),
        ("head.sample_rate=0", "head.sample_rate: found 0, allowed: greater than 0"),
        ("data.batch_size=big", "data.batch_size: found 'big', allowed: integer"),
        ("data.batch_size=true", "data.batch_size: found True, allowed: integer"),
        ("data.train=", "data.train: found nothing, allowed: string"),
        ("data=5", "data: found 5, allowed: a section of its own"),
        ("data.image_size=[112]", "data.image_size: found [112], allowed:"),
        ("run.name=a/b", "run.name: found 'a/b', allowed: letters, digits"),
        ("optimizer.backbone.lr=fast", "optimizer.backbone.lr: found 'fast', allowed: number"),
        ("optimizer.head.betas=[0.9, 0.99]", "optimizer.head.betas: unknown key;"),
        ("optimizer.head.name=adam", "optimizer.head.name: found 'adam', allowed: row_sgd, row_adamw, row_adagrad"),
        ("optimizer.head.name=sgd", "optimizer: head.name is 'sgd', allowed: row_sgd, row_adamw, row_adagrad"),
        ("optimizer.backbone.dense=true", "optimizer: backbone.dense: the backbone's steps are dense anyway"),
        (
            "optimizer.head.dense=true head.storage=host",
            "optimizer.head.dense passes over all centers in every step, which head.storage: host avoids",
        ),
        ("optimizer.backbone.name=row_sgd", "optimizer: backbone.name is 'row_sgd', allowed: sgd, adamw"),
        ("optimizer.backbone={momentum: 0.0, nesterov: true}", "optimizer.backbone: nesterov needs momentum"),
        (
            "head.sample_rate_schedule=[[0.5, 2]]",
            "head: sample_rate_schedule: found [0.5, 2.0], allowed: [share of the run",
        ),
        ("head.sample_rate_schedule=[[0.9, 1], [0.5, 1]]", "head: sample_rate_schedule: found [0.5, 1"),
        ("head.payload_dtype=fp8", "head.payload_dtype: found 'fp8', allowed: 'float32' or 'bf16'"),
        ("head.objective.name=arc", "head.objective: unknown objective 'arc'; allowed: softmax, cosface"),
        ("head.objective={name: arcface, margin: 7}", "head.objective: margin must lie in [0, 3.14159], found 7"),
        ("schedule.epochs=3", "schedule: give exactly one of steps and epochs"),
        ("schedule.warmup_steps=11", "schedule: warmup_steps (11) is more than steps (10)"),
        ("backbone.static_graph=true optimizer.accumulate=2", "backbone.static_graph needs optimizer.accumulate: 1"),
        ("head.storage_dir=/tmp", "storage_dir is the folder of storage: file, and storage is device: leave it out"),
        (
            "head.storage=host checkpoint.asynchronous=true",
            "checkpoint.asynchronous would hold a second copy of the centers, too large for head.storage: host",
        ),
        ("precision=fp8", "precision: found 'fp8', allowed: 'float32', 'bf16' or 'fp16'"),
        ("no-equals-sign", "override 'no-equals-sign': write it as key.sub=value"),
        (
            "data.train=[a, {path: b, wight: 2}]",
            "data.train.1.wight: unknown key; did you mean weight?",
        ),
        ("data.train=[{path: b, weight: 0}]", "data.train.0.weight: found 0, allowed: greater than 0"),
        ("data.train=[a, 3]", "data.train.1: found 3, allowed: a section"),
        ("data.train=[]", "data.train: found [], allowed: List should have at least 1 item"),
        ("data.order=random", "data.order.name: found 'random', allowed: global, blocks, balanced"),
        ("data.order={name: blocks, window: 10}", "data.order: window (10) is less than block_size (1024)"),
        ("data.order=balanced", "data.order.identities: missing; it has to be given"),
        ("data.remainder=keep", "data.remainder: found 'keep', allowed: 'carry' or 'drop'"),
        ("data.augment.blurr.probability=1", "data.augment.blurr: unknown key; did you mean blur?"),
        ("data.augment.blur.probability=2", "data.augment.blur.probability: found 2, allowed: less than or equal to 1"),
        ("data.augment.jpeg.quality=[90, 20]", "data.augment.jpeg: quality: found [90, 20], allowed: [low, high]"),
        ("data.train.deeper=1", "override 'data.train.deeper=1': train is a value, not a section"),
        ("data.train=[", "override 'data.train=[': not valid YAML"),
    ],
)
def test_wrong_values_are_refused_with_path_found_and_allowed(config_file: Path, override: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(config_file, override.split() if override.count("=") > 1 and "{" not in override else [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_sections_are_named() -> None:
    with pytest.raises(UsageError, match=r"data: missing; it has to be given \(and 1 more\)"):
        parse_config({})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "expected sections"),
        ("", "expected sections"),
        (b"\xff\xfe\x00", "not valid"),
    ],
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match=message):
        load_config(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such configuration file"):
        load_config(tmp_path / "none.yaml")


def test_the_configuration_is_frozen(config_file: Path) -> None:
    config: Config = load_config(config_file)
    with pytest.raises(ValueError, match="frozen"):
        config.precision = "bf16"  # type: ignore[misc]
