"""Training on a data set in an object store: the same run as on a local one, each machine reading its part."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pfc.engine.log.telemetry import read_json_lines
from tests.commands import pfc

CONFIG = """
run: {{name: run, dir: {dir}}}
data: {{train: "{train}", batch_size: 8, image_size: [32, 32], order: {order}, cache: {{folder: {dir}/cache}}}}
backbone: {{name: small, embedding_dim: 16, options: {{width: 8}}}}
schedule: {{steps: 6}}
log: {{every_steps: 1, tensorboard: false}}
"""
BLOCKS = "{name: blocks, block_size: 20, window: 80, parts: 2}"


def losses(folder: Path, train: str, order: str = BLOCKS) -> list[float]:
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.format(dir=folder, train=train, order=order))
    done = pfc("train", folder / "config.yaml", "--nproc", "2")
    assert done.exit_code == 0, done.output
    assert (folder / "run" / "report.html").exists()
    return [line["loss"] for line in read_json_lines(folder / "run" / "metrics.jsonl")]


def test_a_run_on_an_object_store_is_the_run_on_the_local_set(at_s3: str, packed: Path, tmp_path: Path) -> None:
    assert losses(tmp_path / "remote", "s3://bucket/faces") == losses(tmp_path / "local", str(packed))


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["data.order.parts=3"], r"data\.order\.parts: 3 do not divide the global batch, 16 images"),
        (["data.order.parts=2", "data.remainder=drop"], r"data\.order\.parts: .* data\.remainder must be carry"),
        (["data.order.parts=2", "data.train=[{path: s3://bucket/faces, weight: 2}]"], r"data\.order\.parts: .*weights"),
        (["data.train=s3://bucket/nothing"], r"s3://bucket/nothing"),
        (["data.cache.gigabytes=0.004"], r"data\.cache\.gigabytes: 0\.004 are too few"),
    ],
)
def test_what_cannot_be_is_one_line(given: list[str], what: str, at_s3: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        CONFIG.format(dir=tmp_path, train="s3://bucket/faces", order="{name: blocks, block_size: 50, window: 400}")
    )
    done = pfc("train", tmp_path / "config.yaml", *given, "--nproc", "2")
    assert done.exit_code == 2, done.output
    assert re.search(what, done.last)
