"""The end of a packing, where the new set takes its place: nothing is lost, whatever stops it or stands there."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pfc.data import RecordDataset, ShardedWriter, UsageError, pack_synthetic
from pfc.data.atomic import restore_replaced
from pfc.data.packing.resume import PartialFolder, StoppedPacking
from pfc.data.records.recordio import RecordWriter
from tests.data.packing.packed import files_of, jpeg, killed_at, make_source, pack_it, refusal


@pytest.mark.parametrize(("name", "first"), [("replace", 1), ("unlink", 2), ("fsync", 9)])
def test_killed_at_its_end_it_loses_nothing(name: str, first: int, tmp_path: Path) -> None:
    root = make_source(tmp_path / "in", 8)
    pack_it(root, tmp_path / "whole")
    call = first
    while killed_at(call, os, name, pack_it, root, tmp_path / "out", save_every=10.0):
        if (tmp_path / "out").exists():
            assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
            assert "is not empty" in refusal(pack_it, root, tmp_path / "out")
            pack_it(root, tmp_path / "out", overwrite=True, seed=1)  # nothing of the first one is in its way
            pack_it(root, tmp_path / "out", overwrite=True)
        else:
            saved = (tmp_path / ".out.partial" / "state.json").exists()
            assert pack_it(root, tmp_path / "out").resumed_at == (8 if saved else 0)
        assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]
        shutil.rmtree(tmp_path / "out")
        call += 1
    assert call > first


@pytest.mark.parametrize(("owner", "name"), [(os, "replace"), (os, "fsync"), (Path, "write_text")])
def test_an_end_that_fails_loses_nothing(
    owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_source(tmp_path / "in", 8)
    pack_it(root, tmp_path / "whole")
    original = getattr(owner, name)
    state = tmp_path / ".out.partial" / "state.json"

    def failing(*arguments: Any, **options: Any) -> Any:
        if state.exists():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return original(*arguments, **options)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        assert "the same command goes on" in refusal(pack_it, root, tmp_path / "out")
    assert pack_it(root, tmp_path / "out").resumed_at == 8
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_stands_at_its_place_by_the_end_stays(overwrite: bool, tmp_path: Path) -> None:
    root = make_source(tmp_path / "in", 8)
    pack_it(root, tmp_path / "whole")
    thesis = tmp_path / "out" / "thesis.txt"

    def write_thesis(done: int, total: int) -> None:
        if done == total:
            thesis.parent.mkdir()
            thesis.write_text("years of work")

    line = refusal(pack_it, root, tmp_path / "out", progress=write_thesis, overwrite=overwrite)
    assert f"what was packed is whole in {tmp_path / '.out.partial' / 'dataset'}: move it, or free its place" in line
    assert thesis.read_text() == "years of work"
    assert files_of(tmp_path / ".out.partial" / "dataset") == files_of(tmp_path / "whole")
    thesis.unlink()
    assert pack_it(root, tmp_path / "out").resumed_at == 8
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_writer_whose_place_is_taken_by_the_end_keeps_what_it_wrote(tmp_path: Path) -> None:
    def write(**_: Any) -> None:
        with ShardedWriter(tmp_path / "out", identities=1, image_size=None, source="a test") as writer:
            writer.write(0, jpeg(1))
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.txt").write_text("years of work")

    line = refusal(write)
    assert files_of(tmp_path / "out") == {"thesis.txt": b"years of work"}
    assert len(RecordDataset.open(Path(line.split(" is whole in ")[1].removesuffix(": move it")))) == 1


def test_a_lost_old_set_is_not_removed_for_files_at_its_place(tmp_path: Path) -> None:
    root = make_source(tmp_path / "in", 8)
    pack_it(root, tmp_path / ".out.replaced")  # as a kill leaves it while it is replaced
    old = files_of(tmp_path / ".out.replaced")
    (tmp_path / "out").mkdir()
    restore_replaced(tmp_path / "out")
    assert files_of(tmp_path / "out") == old
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    restore_replaced(tmp_path / "out")
    assert files_of(tmp_path / ".out.replaced") == old


def test_a_command_given_while_another_ends_takes_nothing_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_source(tmp_path / "in", 8)
    pack_it(root, tmp_path / "whole")
    refused: list[str] = []

    def watched(name: str, *, ended: bool) -> None:
        original = getattr(os, name)

        def ending(*arguments: Any, **options: Any) -> Any:
            if (tmp_path / "out").exists() == ended:
                monkeypatch.setattr(os, name, original)
                for others in ({"seed": 1}, {}, {"seed": 1, "overwrite": True}):
                    refused.append(refusal(pack_it, root, tmp_path / "out", **others))
            return original(*arguments, **options)

        monkeypatch.setattr(os, name, ending)

    watched("replace", ended=False)
    watched("unlink", ended=True)
    pack_it(root, tmp_path / "out")
    packing, full = "another process is packing into it right now", "is not empty"
    assert [packing in line for line in refused] == [True, True, True, False, False, True]
    assert [full in line for line in refused] == [False, False, False, True, True, False]
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_a_resumable_writer_without_a_saved_state_keeps_a_whole_set_too(tmp_path: Path) -> None:
    out = tmp_path / "out"
    options: dict[str, Any] = {"identities": 1, "image_size": None, "source": "test", "resume_key": "one"}

    def write() -> None:
        with ShardedWriter(out, **options) as writer:
            writer.write(0, b"image")
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(StoppedPacking, match="what was packed is whole"):
        write()
    assert (tmp_path / ".out.partial" / "dataset" / "dataset.json").is_file()


def test_a_writer_that_cannot_move_its_set_into_place_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write() -> None:
        with ShardedWriter(tmp_path / "out", identities=1, image_size=None, source="test") as writer:
            writer.write(0, b"image")

    def failing(old: Any, new: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(old), None, str(new))

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(StoppedPacking, match="out: input/output error; what was packed is whole in"):
        write()
    (kept,) = tmp_path.iterdir()
    assert (kept / "dataset.json").is_file()


def test_a_complete_data_set_without_a_state_is_never_wiped(tmp_path: Path) -> None:
    root = make_source(tmp_path / "in", 8)
    pack_it(root, tmp_path / "out")
    whole = files_of(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.partial")
    assert "move it to keep it, or remove it" in refusal(pack_it, root, tmp_path / "out")
    left = files_of(tmp_path / ".out.partial")
    assert {name: left[name] for name in whole} == whole


def test_where_a_disk_is_mounted_nothing_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_source(tmp_path / "in", 8)
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "out")
    line = refusal(pack_it, root, tmp_path / "out")
    out = tmp_path / "out"
    assert line == f"{out} is where a disk is mounted: give a directory in it, such as {out / 'train'}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]
    pack_it(root, tmp_path / "out" / "train")


@pytest.mark.parametrize(
    ("owner", "name"),
    [(os, "fsync"), (os, "rename"), (os, "replace"), (os, "unlink"), (os, "rmdir"), (PartialFolder, "close")],
)
def test_killed_anywhere_while_it_overwrites_a_whole_set_remains(owner: Any, name: str, tmp_path: Path) -> None:
    root = make_source(tmp_path / "in", 8)
    pack_it(root, tmp_path / "whole")
    pack_it(root, tmp_path / "old", size=9)
    old, new = files_of(tmp_path / "old"), files_of(tmp_path / "whole")
    shutil.copytree(tmp_path / "old", tmp_path / "out")
    call = 1
    while killed_at(call, owner, name, pack_it, root, tmp_path / "out", overwrite=True, save_every=10.0):
        standing = [files_of(tmp_path / place) for place in ("out", ".out.replaced")]
        assert old in standing or new in standing
        if not (tmp_path / "out").exists():
            with pytest.raises(UsageError, match=r"was to be replaced.*\.out\.replaced"):
                RecordDataset.open(tmp_path / "out")
            assert "is not empty" in refusal(pack_it, root, tmp_path / "out")
            assert files_of(tmp_path / "out") == old
        pack_it(root, tmp_path / "out", overwrite=True)
        assert files_of(tmp_path / "out") == new
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "old", "out", "whole"]
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(tmp_path / "old", tmp_path / "out")
        call += 1
    assert call > 1
    assert files_of(tmp_path / "out") == new


def test_an_old_set_that_cannot_be_moved_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_source(tmp_path / "in")
    pack_it(root, tmp_path / "whole")
    pack_it(root, tmp_path / "out", size=9)
    old = files_of(tmp_path / "out")
    for name in ("rename", "replace"):  # the old one aside, the new one in its place

        def failing(*_: Any) -> None:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

        with monkeypatch.context() as patched:
            patched.setattr(os, name, failing)
            assert "device or resource busy" in refusal(pack_it, root, tmp_path / "out", overwrite=True)
        assert files_of(tmp_path / "out") == old
    pack_it(root, tmp_path / "out", overwrite=True)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_an_old_set_of_which_files_stay_is_in_nobodys_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_source(tmp_path / "in")
    pack_it(root, tmp_path / "out")
    remove = shutil.rmtree

    def held(path: Any, **options: Any) -> None:
        if "replaced" not in Path(path).name:  # NFS keeps the files that a process maps
            remove(path, **options)

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", held)
        for seed in (1, 2):
            pack_it(root, tmp_path / "out", seed=seed, overwrite=True)
    pack_it(root, tmp_path / "out", seed=3, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["write", "close"])
def test_a_writer_on_a_full_disk_ends_in_one_line(
    number: int, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(RecordWriter, name, full)
    line = refusal(pack_synthetic, tmp_path / "out", identities=2, images_per_identity=2, size=16)
    assert line == f"{tmp_path / 'out'} cannot be written: {os.strerror(number).lower()}; free some space"
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_no_disk_takes_is_one_line(tmp_path: Path) -> None:
    root = make_source(tmp_path / "in")
    assert "cannot be written: file name too long" in refusal(pack_it, root, tmp_path / ("x" * 300))
