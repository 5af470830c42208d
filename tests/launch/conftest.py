"""A small packed data set, its pairs, and a run that was trained on it."""

from pathlib import Path

import pytest

from pfc.data import RecordDataset, make_pairs, pack_synthetic, write_pairs
from tests.commands import pfc

CONFIG = """
run: {{name: tiny, dir: {folder}/runs}}
data: {{train: {folder}/set, batch_size: 4}}
backbone: {{name: small, embedding_dim: 16}}
schedule: {{steps: {steps}, warmup_steps: 1}}
evaluation: {{every_steps: {steps}, pairs: [{folder}/pairs.bin]}}
checkpoint: {{every_steps: {steps}}}
log: {{every_steps: 1, tensorboard: false}}
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the data set ``set`` and ``pairs.bin``."""
    folder = tmp_path_factory.mktemp("launch")
    pack_synthetic(folder / "set", identities=6, images_per_identity=4, size=32, workers=1)
    write_pairs(folder / "pairs.bin", make_pairs(RecordDataset.open(folder / "set"), 20, seed=0))
    return folder


@pytest.fixture(scope="session")
def run_dir(folder: Path) -> Path:
    """A run of two steps on one rank."""
    (folder / "tiny.yaml").write_text(CONFIG.format(folder=folder, steps=2), encoding="utf-8")
    assert pfc("train", folder / "tiny.yaml", "--nproc", "1").exit_code == 0
    return folder / "runs" / "tiny"
