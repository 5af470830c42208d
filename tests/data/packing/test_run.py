"""Packing that is interrupted, goes on, and ends with the same bytes; and what stops it."""

import errno
import fcntl
import os
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pfc.data import RecordDataset, UsageError, pack_folder, pack_list, pack_recordio
from pfc.data.packing import run as pack_run
from pfc.data.packing import sources
from pfc.data.packing.resume import PartialFolder
from pfc.data.records import recordio
from pfc.data.records.recordio import RecordWriter
from pfc.data.workers import WorkerDied
from tests.data.packing.packed import files_of, fork, jpeg, killed_at, make_source, pack_it, refusal


@pytest.mark.parametrize(
    ("owner", "name", "call"),
    [
        *[(RecordWriter, "write", call) for call in (1, 2, 16, 33, 34)],
        *[(os, "fsync", call) for call in (1, 3, 8, 100)],
        *[(Path, "replace", call) for call in (1, 2, 39)],
        (os, "replace", 1),
    ],
)
def test_killed_anywhere_it_goes_on_to_the_same_bytes(owner: Any, name: str, call: int, tmp_path: Path) -> None:
    root = make_source(tmp_path / "in")
    pack_it(root, tmp_path / "whole")
    assert killed_at(call, owner, name, pack_it, root, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    summary = pack_it(root, tmp_path / "out")
    assert (summary.images, len(summary.skipped)) == (34, 6)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out", "whole"]


def test_a_lost_shard_of_an_interrupted_packing_is_told_with_what_to_do(tmp_path: Path) -> None:
    root = make_source(tmp_path / "in")
    assert killed_at(20, Path, "replace", pack_it, root, tmp_path / "out")
    for path in (tmp_path / ".out.partial" / "dataset").glob("*.idx"):
        path.unlink()
    line = refusal(pack_it, root, tmp_path / "out")
    assert f"is lost: remove {tmp_path / '.out.partial'} and pack again" in line


def test_a_lock_that_was_removed_before_it_was_taken_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / ".out.partial"
    first = PartialFolder(place, "one")
    original = fcntl.flock

    def flock(*arguments: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", original)
        first.close(keep=False)  # between this one's opening of the lock and its taking it
        original(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    second = PartialFolder(place, "two")
    assert "another process is packing" in refusal(lambda workers: PartialFolder(place, "three"))
    second.close(keep=False)


def test_a_file_that_lost_its_end_is_not_gone_on_with(tmp_path: Path) -> None:
    root = make_source(tmp_path / "in")
    killed_at(20, RecordWriter, "write", pack_it, root, tmp_path / "out")
    for name in ("dataset/train-00000.rec", "dataset/train-00001.idx", "skipped"):
        path = tmp_path / ".out.partial" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:5])
        line = refusal(pack_it, root, tmp_path / "out")
        assert line.startswith(f"{path} has 5 bytes, the interrupted packing had written ")
        assert path.read_bytes() == whole[:5]
        path.write_bytes(whole)
    assert pack_it(root, tmp_path / "out").resumed_at == 22


def test_an_error_late_in_a_first_run_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_source(tmp_path / "in", 8)
    monkeypatch.setattr(pack_run, "SAVE_EVERY", 0.0)

    def failing(*_: Any) -> None:
        raise UsageError("something is amiss")

    with monkeypatch.context() as patched:
        patched.setattr(pack_run, "_write_skipped", failing)
        assert refusal(pack_it, root, tmp_path / "out") == "something is amiss"
    assert pack_it(root, tmp_path / "out").resumed_at == 8


def test_an_image_too_large_for_a_record_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_source(tmp_path / "in", 8)
    (root / "person-1" / "large.jpg").write_bytes(jpeg(1) + bytes(5000))
    monkeypatch.setattr(recordio, "MAX_PAYLOAD", 5000)
    summary = pack_folder(root, tmp_path / "out", keep_bytes=True, workers=1)
    assert (summary.images, len(summary.skipped)) == (6, 3)
    assert ("person-1/large.jpg", "a record holds at most 5000 bytes") in [
        (name, reason.split(",")[0]) for name, reason in summary.skipped
    ]


def test_with_more_shards_than_readable_images_some_are_left_out(tmp_path: Path) -> None:
    root = make_source(tmp_path / "in", 9)
    summary = pack_it(root, tmp_path / "out", shards=9)
    assert (summary.images, summary.shards) == (7, 7)
    assert len(RecordDataset.open(tmp_path / "out")) == 7
    assert len(list((tmp_path / "out").glob("*.rec"))) == 7


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOMEM, errno.EMFILE])
@pytest.mark.parametrize("place", ["open", "decode"])
def test_where_the_machine_fails_no_image_is_left_out(
    place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_source(tmp_path / "in", 8)
    calls = 0

    def failing(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < 6:
            return original(*_, **__)
        raise MemoryError if place == "decode" and number == errno.ENOMEM else OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        owner, name = (sources.base, "_open_at_once") if place == "open" else (Image, "open")
        original = getattr(owner, name)
        patched.setattr(pack_run, "SAVE_EVERY", 0.0)
        patched.setattr(owner, name, failing)
        line = refusal(pack_it, root, tmp_path / "out")
    assert re.search(rf"stopped at {root}/person-\d/\d.jpg: {os.strerror(number).lower()}; .* goes on", line)
    summary = pack_it(root, tmp_path / "out")
    assert (summary.resumed_at, summary.images, len(summary.skipped)) == (5, 6, 2)


@pytest.mark.parametrize("error", [WorkerDied("a worker process died: use fewer workers"), MemoryError()])
def test_a_lack_of_memory_stops_it_and_it_goes_on(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_source(tmp_path / "in")
    original = pack_run.parallel_map

    def dying(*arguments: Any, **options: Any) -> Any:
        for done, result in enumerate(original(*arguments, **options)):
            if done == 20:
                raise error
            yield result

    with monkeypatch.context() as patched:
        patched.setattr(pack_run, "SAVE_EVERY", 0.0)
        patched.setattr(pack_run, "parallel_map", dying)
        line = refusal(pack_it, root, tmp_path / "out")
    assert "use fewer workers; the command then goes on where it stopped" in line
    assert pack_it(root, tmp_path / "out").resumed_at == 20


def test_killed_again_and_again_it_still_ends(tmp_path: Path) -> None:
    root = make_source(tmp_path / "in")
    pack_it(root, tmp_path / "whole")
    for _ in range(6):  # five images a time
        assert killed_at(6, RecordWriter, "write", pack_it, root, tmp_path / "out")
    assert not killed_at(6, RecordWriter, "write", pack_it, root, tmp_path / "out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert "is not empty" in refusal(pack_it, root, tmp_path / "out")


def test_a_resumed_packing_says_so(tmp_path: Path) -> None:
    root = make_source(tmp_path / "in")
    killed_at(20, RecordWriter, "write", pack_it, root, tmp_path / "out")
    summary = pack_it(root, tmp_path / "out")
    assert 19 <= summary.resumed_at < 30
    assert f"which had done {summary.resumed_at} images" in str(summary)


def test_recordio_and_parquet_go_on_too(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    from pfc.data import pack_table

    table = arrow.table({"image": [jpeg(i) for i in range(30)], "label": [i % 3 for i in range(30)]})
    parquet.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    packing = (pack_table, tmp_path / "t.parquet", tmp_path / "out")
    for call, owner, name in ((2, os, "fsync"), (9, RecordWriter, "write"), (60, RecordWriter, "write")):
        killed_at(call, owner, name, *packing, size=8, workers=1)
    pack_table(tmp_path / "t.parquet", tmp_path / "whole", size=8, workers=1, name="out")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")

    packing = (pack_recordio, [tmp_path / "out"], tmp_path / "again")
    killed_at(9, RecordWriter, "write", *packing, shards=2, seed=3, workers=1)
    assert pack_recordio([tmp_path / "out"], tmp_path / "again", shards=2, seed=3, workers=1).resumed_at == 8
    pack_recordio(tmp_path / "out", tmp_path / "once", shards=2, seed=3, workers=1, name="again")
    assert files_of(tmp_path / "again") == files_of(tmp_path / "once")


def test_another_packing_does_not_go_on_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_source(tmp_path / "in")
    killed_at(20, RecordWriter, "write", pack_it, root, tmp_path / "out")
    left = files_of(tmp_path / ".out.partial")
    for options in ({"seed": 1}, {"size": 9}, {"shards": 2}, {"min_images": 2, "size": 7}, {"name": "other"}):
        assert "keeps an interrupted packing with other options" in refusal(pack_it, root, tmp_path / "out", **options)
    with monkeypatch.context() as patched:
        patched.setattr(np, "__version__", "another")  # it may shuffle in another way
        assert "or by another version" in refusal(pack_it, root, tmp_path / "out")
    (root / "person-0" / "new.jpg").write_bytes(jpeg(99))
    assert "remove that folder" in refusal(pack_it, root, tmp_path / "out")
    assert files_of(tmp_path / ".out.partial") == left


def test_two_packings_do_not_write_the_same_data_set(tmp_path: Path) -> None:
    root = make_source(tmp_path / "in")
    other = PartialFolder(tmp_path / ".out.partial", "another")
    assert "another process is packing" in refusal(pack_it, root, tmp_path / "out")
    other.close(keep=True)
    pack_it(root, tmp_path / "out")


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize(("owner", "name"), [(fcntl, "flock"), (Path, "mkdir"), (Path, "open"), (Path, "read_bytes")])
def test_an_interrupted_packing_that_cannot_be_looked_at_is_kept(
    number: int, owner: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_source(tmp_path / "in")
    killed_at(20, RecordWriter, "write", pack_it, root, tmp_path / "out")
    left = files_of(tmp_path / ".out.partial")

    original = getattr(owner, name)

    def failing(path: Any, *args: Any, **kwargs: Any) -> Any:
        if ".out.partial" in str(getattr(path, "name", path)) or ".out.partial/" in str(path):
            raise OSError(number, os.strerror(number))
        return original(path, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        line = refusal(pack_it, root, tmp_path / "out")
    assert f"cannot be taken up: {os.strerror(number).lower()}" in line
    assert "what it keeps of an interrupted packing stays" in line
    assert files_of(tmp_path / ".out.partial") == left
    assert pack_it(root, tmp_path / "out").resumed_at == 22
    pack_it(root, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_nothing_can_be_locked_packing_goes_on_and_says_so(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_source(tmp_path / "in")
    killed_at(20, RecordWriter, "write", pack_it, root, tmp_path / "out")

    def failing(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", failing)
        with pytest.warns(UserWarning, match=r"out\.partial: its disk keeps no locks .* let no second"):
            summary = pack_it(root, tmp_path / "out")
    assert summary.resumed_at == 22
    pack_it(root, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("state", [b"", b"{", b"[]", b'{"key": 1}', b"\xff"])
def test_a_state_that_cannot_be_read_is_one_line(state: bytes, tmp_path: Path) -> None:
    root = make_source(tmp_path / "in")
    killed_at(20, RecordWriter, "write", pack_it, root, tmp_path / "out")
    (tmp_path / ".out.partial" / "state.json").write_bytes(state)
    assert "is damaged: remove that folder" in refusal(pack_it, root, tmp_path / "out")
    assert (tmp_path / ".out.partial" / "dataset" / "train-00000.rec").exists()


def test_a_full_disk_is_one_line_and_no_loss(tmp_path: Path) -> None:
    root = make_source(tmp_path / "in")
    pack_it(root, tmp_path / "whole")

    def run() -> None:
        pack_run.SAVE_EVERY = 0.0
        resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
        try:
            pack_it(root, tmp_path / "out")
        except UsageError as error:
            os._exit(0 if "free some space, then the same command goes on" in str(error) else 1)
        os._exit(2)

    process = fork.Process(target=run)
    process.start()
    process.join()
    assert process.exitcode == 0
    assert not (tmp_path / "out").exists()
    assert pack_it(root, tmp_path / "out").resumed_at > 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_strict_stops_and_goes_on_when_the_image_is_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_source(tmp_path / "in", 20)
    monkeypatch.setattr(pack_run, "SAVE_EVERY", 0.0)
    for i in (0, 7, 14):
        line = refusal(pack_it, root, tmp_path / "out", strict=True)
        assert "no image format starts like this (packing is strict)" in line
        (root / line.split(":")[0]).write_bytes(jpeg(i))
    assert not (tmp_path / "out").exists()
    summary = pack_it(root, tmp_path / "out", strict=True)
    assert (summary.images, summary.skipped) == (20, [])


def test_a_hopeless_source_is_given_up_early(tmp_path: Path) -> None:
    (tmp_path / "some.lst").write_text("".join(f"{i}\t0\t{i}.jpg\n" for i in range(3000)))
    calls: list[int] = []
    line = refusal(pack_list, tmp_path / "some.lst", tmp_path / "out", progress=lambda done, _: calls.append(done))
    assert "none of the first 1,000 images can be read, e.g. " in line
    assert max(calls) < 1000
    assert [path.name for path in tmp_path.iterdir()] == ["some.lst"]


def test_the_command_killed_at_any_time(tmp_path: Path) -> None:
    """With worker processes, which end with it."""
    root = make_source(tmp_path / "in", 600)
    command = [
        sys.executable,
        "-c",
        "import sys; from pfc.data.packing import run; run.SAVE_EVERY = 0.01; from pfc.launch.cli import main; "
        "sys.exit(main(sys.argv[1:]))",
        *("pack", "folder", str(root), str(tmp_path / "out"), "--size", "100", "--workers", "2", "--name", "set"),
    ]
    random = np.random.default_rng()
    state = tmp_path / ".out.partial" / "state.json"
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        until = time.monotonic() + 60
        while process.poll() is None and not (state.exists() and len(children_of(process.pid)) >= 2):
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))
        children = children_of(process.pid)
        process.kill()
        process.wait()
        while any(map(is_running, children)):
            assert time.monotonic() < until
            time.sleep(0.01)
        assert state.exists() or (tmp_path / "out").exists()
        if (tmp_path / "out").exists():
            break  # it ended before it was killed
    if not (tmp_path / "out").exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    pack_folder(root, tmp_path / "whole", size=100, workers=1, name="set")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert len(RecordDataset.open(tmp_path / "out")) == 600 - 86


def children_of(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except FileNotFoundError:  # it has ended
        return []


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
