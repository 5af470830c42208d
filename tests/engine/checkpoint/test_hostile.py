"""Checkpoints from elsewhere: tables and tensors that ask for more than numbers, and files cut short."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from pfc.data.errors import UsageError
from pfc.engine.checkpoint import (
    find,
    load,
    read_pieces,
)
from pfc.launch.cli import main
from tests.engine.runs import configuration, pack, train
from tests.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(tmp_path_factory.mktemp("data"))


class Evil:
    """Its pickle writes a file when it is loaded with torch's or Python's own reader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Path:
    """A run whose one checkpoint torch's own writer has written anew."""
    config = configuration(folder, tmp_path)
    train(1, config, steps=1)
    run_ranks(1, _write_anew, find(config.run.path).path)
    return config.run.path


def _write_anew(checkpoint: Path) -> None:
    tensors = load(find(checkpoint), {}, ("backbone", "head"))
    dcp.save(tensors, checkpoint_id=checkpoint)


def _change_table(run: Path, change: Callable[[Metadata], Any]) -> None:
    path = find(run).path / ".metadata"
    table = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(table) or table))


def test_what_torch_itself_wrote_is_read(run: Path, folder: Path) -> None:
    assert "head/centers" in find(run).shapes()
    assert sum(len(rows) for _, rows in read_pieces(find(run), "head/centers")) == 37
    assert main(["evaluate", str(run), "--pairs", str(folder / "pairs.bin")]) == 0


def _leave(table: Metadata) -> None:
    for place in table.storage_data.values():
        place.relative_path = f"../{place.relative_path}"


def _unpickled_by_torch(table: Metadata) -> None:
    name = next(name for name in table.state_dict_metadata if name.startswith("backbone/"))
    table.state_dict_metadata[name] = BytesStorageMetadata()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: (Evil(Path("evil")), table), "refused: it holds posix.mkdir"),
        (lambda table: table.state_dict_metadata.update(x=Evil(Path("evil"))), "refused: it holds posix.mkdir"),
        (_leave, r"refused: it holds the file name '\.\./__0_0\.distcp', which leaves the checkpoint's directory"),
        (_unpickled_by_torch, "refused: it holds torch.distributed.checkpoint.metadata.BytesStorageMetadata"),
        (lambda _: [1, 2], "refused: it holds list where Metadata belongs"),
    ],
)
def test_a_hostile_table_is_refused(
    run: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Metadata], Any],
    message: str,
) -> None:
    monkeypatch.chdir(run)
    _change_table(run, change)
    _assert_refused(run, folder, capsys, message)
    assert not Path("evil").exists()


def test_a_hostile_tensor_is_refused(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    name = find(run).path / "__0_0.distcp"
    torch.save(Evil(Path("evil")), name)
    length = name.stat().st_size
    name.write_bytes(name.read_bytes() + bytes(10_000_000))

    def point(table: Metadata) -> None:
        for place in table.storage_data.values():
            place.offset, place.length = 0, length

    _change_table(run, point)
    _assert_refused(run, folder, capsys, "cannot be read: .*no code in a file is run")
    with pytest.raises(UsageError, match="no code in a file is run"):
        list(read_pieces(find(run), "head/centers"))
    assert not Path("evil").exists()


def test_a_file_that_was_cut_short_is_found(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = find(run).path / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-100])
    _assert_refused(run, folder, capsys, "__0_0.distcp has .* bytes of .*: the checkpoint is damaged")
    path.unlink()
    _assert_refused(run, folder, capsys, "__0_0.distcp is missing: the checkpoint is damaged")
    (path.parent / ".metadata").write_bytes(b"\x80\x04nonsense")
    _assert_refused(run, folder, capsys, ".metadata is damaged")


def _assert_refused(run: Path, folder: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run), "--pairs", str(folder / "pairs.bin")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    with pytest.raises(UsageError, match=message):
        raise UsageError(lines[0])
