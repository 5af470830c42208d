"""Data sets on servers: they read as local ones do, through slow, failing and short answers, and a bounded cache."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pfc.data import (
    JointDataset,
    RecordDataset,
    RemoteOptions,
    TrainLoader,
    UsageError,
    inspect_dataset,
    pack_synthetic,
)
from pfc.data.order.orders import BlockOrder, Order
from pfc.data.remote import store as remote_store
from tests.data.remote.servers import WebServer
from tests.ranks import run_ranks

BLOCK = 1 << 20


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between attempts."""
    monkeypatch.setattr(remote_store, "_FIRST_WAIT", 0.01)


def options(folder: Path, gigabytes: float = 1.0, timeout: float = 20.0, attempts: int = 5) -> RemoteOptions:
    return RemoteOptions(str(folder / "cache"), gigabytes, timeout, attempts)


def blocks(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "cache" / "blocks").rglob("*") if path.is_file())


def shards_asked(web: WebServer) -> list[tuple[str, int, int]]:
    return [asked for asked in web.asked if asked[0].endswith(".rec")]


def batches(dataset: RecordDataset | JointDataset, count: int, order: Order | None = None) -> list[tuple]:
    loader = TrainLoader(dataset, batch_size=32, image_size=(112, 112), order=order, threads=1)
    try:
        found = [next(loader) for _ in range(count)]
        return [(batch.images.clone(), batch.labels.clone(), batch.samples.copy()) for batch in found]
    finally:
        loader.close()


def same(ours: list[tuple], theirs: list[tuple]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, x) and torch.equal(b, y) and np.array_equal(c, z)
        for (a, b, c), (x, y, z) in zip(ours, theirs, strict=True)
    )


def test_a_remote_set_reads_as_the_local_one(web: WebServer, packed: Path, tmp_path: Path) -> None:
    local, remote = RecordDataset.open(packed), RecordDataset.open(f"{web.url}/faces/", remote=options(tmp_path))
    assert (remote.name, len(remote), remote.num_classes, remote.image_size) == ("faces", 2000, 50, (112, 112))
    assert remote.manifest == local.manifest
    for index in range(0, 2000, 61):
        label, image = remote.read(index)
        assert label == local.label(index)
        assert np.array_equal(image, local.read(index)[1])
    assert np.array_equal(remote.labels(), local.labels())


@pytest.mark.parametrize("order", [None, BlockOrder(2000, 3, block_size=50, window=400)], ids=["global", "blocks"])
@pytest.mark.parametrize("compiled", [True, False])
def test_batches_are_those_of_the_local_set(
    order: Order | None,
    compiled: bool,
    web: WebServer,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not compiled:
        monkeypatch.setattr("pfc.data.loading.plain.compiled", lambda: None)
    local, remote = RecordDataset.open(packed), RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path))
    assert same(batches(remote, 65, order), batches(local, 65, order))


def test_a_local_and_a_remote_set_together(web: WebServer, packed: Path, tmp_path: Path) -> None:
    remote = JointDataset.open([packed, f"{web.url}/faces"], remote=options(tmp_path))
    assert same(batches(remote, 40), batches(JointDataset.open([packed, packed]), 40))


def test_one_shard_alone(web: WebServer, packed: Path, tmp_path: Path) -> None:
    local = RecordDataset.open(packed / "train-00001.rec")
    remote = RecordDataset.open(f"{web.url}/faces/train-00001.rec", remote=options(tmp_path))
    assert len(remote) == len(local) < 2000
    assert np.array_equal(remote.labels(), local.labels())
    assert {path for path, _, _ in shards_asked(web)} == {"/faces/train-00001.rec"}


@pytest.mark.parametrize("trouble", ["fail", "cut", "short", "hang"])
def test_bad_answers_are_asked_for_again(trouble: str, web: WebServer, packed: Path, tmp_path: Path) -> None:
    web.trouble = lambda number, path: trouble if number % 3 == 0 else None
    remote = RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path, timeout=1 if trouble == "hang" else 20))
    assert np.array_equal(remote.labels(), RecordDataset.open(packed).labels())
    assert len(web.asked) > 16  # more than where nothing goes wrong


@pytest.mark.parametrize(
    ("trouble", "what"),
    [
        ("fail", r"in 2 attempts: 503, .*; check the network"),
        ("cut", r"in 2 attempts: .*; check the network"),
        ("short", r"in 2 attempts: [\d,]+ bytes came, [\d,]+ were asked for"),
        ("whole", r"does this server answer requests for parts of a file\?"),
        ("hang", r"in 2 attempts: no answer in time"),
        ("refuse", r": 403, .*check the credentials"),
    ],
)
def test_a_server_that_stays_bad_ends_it_with_one_line(trouble: str, what: str, web: WebServer, tmp_path: Path) -> None:
    remote = RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path, timeout=0.5, attempts=2))
    web.trouble = lambda number, path: trouble
    with pytest.raises(UsageError, match=what) as caught:
        remote.labels()
    assert str(caught.value).startswith(f"{web.url}/faces/train-0000")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=what):
        batches(remote, 60)


def test_what_is_not_there_is_said(web: WebServer, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"/nothing: no such file or folder; check the address"):
        RecordDataset.open(f"{web.url}/nothing", remote=options(tmp_path))
    with pytest.raises(UsageError, match=r"/faces/other.rec: no such file"):
        RecordDataset.open(f"{web.url}/faces/other.rec", remote=options(tmp_path))
    web.close()
    with pytest.raises(UsageError, match=r"cannot be read, in 2 attempts: "):
        RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path, attempts=2))


def test_without_its_package_one_line_says_what_to_install(
    web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(UsageError, match=r"gs://.*another package.*pip install 'pfc\[remote\]'"):
        RecordDataset.open("gs://bucket/faces", remote=options(tmp_path))
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(UsageError, match=r"fsspec: pip install 'pfc\[remote\]'"):
        RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path))


def test_what_was_fetched_is_not_fetched_again(web: WebServer, tmp_path: Path) -> None:
    first = RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path))
    first.labels()
    fetched = [(path, start, stop) for path, start, stop in shards_asked(web)]
    for path in {path for path, _, _ in fetched}:  # each byte once
        stretches = sorted((start, stop) for asked, start, stop in fetched if asked == path)
        assert all(stop == start for (_, stop), (start, _) in pairwise(stretches))
    web.asked.clear()
    again = RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path))
    again.read(1999)
    batches(again, 63)
    assert {path for path, _, _ in web.asked} == {"/faces/dataset.json"} or not web.asked


def test_a_changed_remote_set_is_read_anew(web: WebServer, packed: Path, tmp_path: Path) -> None:
    RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path)).labels()
    served = tmp_path / "web" / "faces"
    shutil.rmtree(served)
    pack_synthetic(served, identities=60, images_per_identity=30, size=112, shards=2, workers=1, seed=5)
    remote = RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path))
    assert (remote.num_classes, len(remote.shards)) == (60, 2)
    assert np.array_equal(remote.labels(), RecordDataset.open(served).labels())


def test_a_block_that_is_damaged_on_the_disk_is_fetched_again(web: WebServer, packed: Path, tmp_path: Path) -> None:
    RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path)).labels()
    for number, path in enumerate(blocks(tmp_path)):
        content = bytearray(path.read_bytes())
        if number % 3 == 0:
            content[len(content) // 2] ^= 1
        elif number % 3 == 1:
            content = content[: len(content) // 2]
        path.write_bytes(content)
    again = run_ranks(1, read_labels, f"{web.url}/faces", options(tmp_path))[0]  # a process that has not checked them
    assert np.array_equal(again, RecordDataset.open(packed).labels())


def read_labels(url: str, given: RemoteOptions) -> np.ndarray:
    remote = RecordDataset.open(url, remote=given)
    return np.array([remote.label(index) for index in range(len(remote))])


def test_the_cache_stays_within_its_limit(web: WebServer, packed: Path, tmp_path: Path) -> None:
    order = BlockOrder(2000, 3, block_size=50, window=100)
    given = options(tmp_path, gigabytes=0.006)
    remote = RecordDataset.open(f"{web.url}/faces", remote=given)
    assert same(batches(remote, 130, order), batches(RecordDataset.open(packed), 130, order))
    assert 0 < sum(path.stat().st_size for path in blocks(tmp_path)) < 0.006e9 + 2 * 16 * BLOCK
    assert len({*shards_asked(web)}) < len(shards_asked(web))  # what was removed came again


def test_a_cache_that_is_too_small_is_refused(web: WebServer, tmp_path: Path) -> None:
    small = RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path, gigabytes=0.002))
    with pytest.raises(UsageError, match=r"data\.cache\.gigabytes: 0\.002 are too few .* choose data\.order: blocks"):
        batches(small, 1)
    with pytest.raises(UsageError, match=r"data\.cache\.gigabytes: .*take a smaller data\.order\.window"):
        batches(small, 1, BlockOrder(2000, 3, block_size=50, window=1000))


def read_part(url: str, given: RemoteOptions, seed: int) -> list[tuple]:
    os.environ["LOCAL_RANK"], os.environ["LOCAL_WORLD_SIZE"] = str(torch.distributed.get_rank()), "3"
    order = BlockOrder(2000, seed, block_size=50, window=100)
    return batches(RecordDataset.open(url, remote=given), 64, order)


def test_ranks_share_one_cache_while_it_overflows(web: WebServer, packed: Path, tmp_path: Path) -> None:
    local = batches(RecordDataset.open(packed), 64, BlockOrder(2000, 9, block_size=50, window=100))
    for found in run_ranks(3, read_part, f"{web.url}/faces", options(tmp_path, gigabytes=0.008), 9):
        assert same(found, local)


def test_ranks_fetch_each_byte_once(web: WebServer, tmp_path: Path) -> None:
    run_ranks(3, read_part, f"{web.url}/faces", options(tmp_path), 9)
    for path in {path for path, _, _ in shards_asked(web)}:
        stretches = sorted((start, stop) for asked, start, stop in shards_asked(web) if asked == path)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(stretches))


def test_a_mirror_opens_as_a_data_set(web: WebServer, packed: Path, tmp_path: Path) -> None:
    folder = RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path)).folder
    assert np.array_equal(RecordDataset.open(folder).labels(), RecordDataset.open(packed).labels())


def test_inspect_checks_a_remote_set(web: WebServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    report = inspect_dataset(Path(f"{web.url}/faces"), workers=1)  # as the command line has it: with one slash less
    assert (report.images, report.damaged) == (2000, 0)
    rec = tmp_path / "web" / "faces" / "train-00000.rec"
    content = bytearray(rec.read_bytes())
    content[len(content) // 2] ^= 255
    rec.write_bytes(content)
    (error,) = inspect_dataset(f"{web.url}/faces", workers=1).errors
    assert "sha256" in error.what


def test_an_object_store(at_s3: str, packed: Path, tmp_path: Path) -> None:
    remote = RecordDataset.open("s3://bucket/faces", remote=options(tmp_path))
    assert same(batches(remote, 20), batches(RecordDataset.open(packed), 20))
    with pytest.raises(UsageError, match=r"s3://bucket/other: no such file or folder|s3://bucket/other holds no .rec"):
        RecordDataset.open("s3://bucket/other", remote=options(tmp_path))


def test_a_store_without_dataset_json_is_listed(packed: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    shutil.copytree(packed, mount)
    (mount / "dataset.json").unlink()
    remote = RecordDataset.open(f"file://{mount}", remote=options(tmp_path))
    assert (len(remote.shards), remote.num_classes) == (3, 50)
    assert np.array_equal(remote.labels(), RecordDataset.open(packed).labels())


def test_a_data_set_cannot_name_files_elsewhere(web: WebServer, tmp_path: Path) -> None:
    path = tmp_path / "web" / "faces" / "dataset.json"
    for name in ("../../../../pwned", "/tmp/pwned", ".hidden"):
        about = json.loads(path.read_text())
        about["shards"][0]["idx"] = name
        path.write_text(json.dumps(about))
        with pytest.raises(UsageError, match=r"dataset\.json: shards\.0\.idx: .*not the name of a file beside it"):
            RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path))


def test_without_tags_the_checksum_tells_a_changed_shard(web: WebServer, tmp_path: Path) -> None:
    web.tags = False
    assert len(set(RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path)).labels())) == 50
    served = tmp_path / "web" / "faces"
    shutil.rmtree(served)
    pack_synthetic(served, identities=25, images_per_identity=80, size=112, shards=3, workers=1, seed=1)
    remote = RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path))
    assert np.array_equal(remote.labels(), RecordDataset.open(served).labels())
    (served / "dataset.json").unlink()
    with pytest.raises(UsageError, match=r"neither its ETag nor when it was changed"):
        RecordDataset.open(f"{web.url}/faces/train-00000.rec", remote=options(tmp_path))


def test_what_the_set_has_no_more_is_gone_here_too(packed: Path, tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    shutil.copytree(packed, mount)
    (mount / "dataset.json").unlink()
    (mount / "property").write_text("90,112,112")
    assert RecordDataset.open(f"file://{mount}", remote=options(tmp_path)).num_classes == 90
    (mount / "property").unlink()
    assert RecordDataset.open(f"file://{mount}", remote=options(tmp_path)).num_classes == 50


def test_a_store_that_lists_nothing_refuses_what_it_does_not_have(web: WebServer, tmp_path: Path) -> None:
    web.missing = 403
    assert len(RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path))) == 2000
    (tmp_path / "web" / "faces" / "dataset.json").unlink()
    with pytest.raises(UsageError, match=r"403.*check the credentials"):
        RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path))


def test_a_process_that_stands_still_with_a_lock_holds_nobody_up(web: WebServer, tmp_path: Path) -> None:
    given = options(tmp_path, timeout=0.5, attempts=2)
    remote = RecordDataset.open(f"{web.url}/faces", remote=given)
    remote.label(0)
    held = [os.open(folder, os.O_RDONLY) for folder in {path.parent for path in blocks(tmp_path)}]
    for descriptor in held:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert len(set(remote.labels())) == 50
    for descriptor in held:
        os.close(descriptor)


END = """
import sys
from pfc.data import RecordDataset, RemoteOptions
for shard in RecordDataset.open(sys.argv[1], remote=RemoteOptions(sys.argv[2])).shards:
    shard.file.will_need(0, shard.file.size)
print("asked", flush=True)
"""


def test_a_program_ends_while_more_is_fetched(tmp_path: Path, packed: Path) -> None:
    (tmp_path / "web" / "faces").mkdir(parents=True)
    about = json.loads((packed / "dataset.json").read_text())
    entry, about["shards"] = about["shards"][0], []
    for number in range(40):
        for suffix in ("rec", "idx"):
            (tmp_path / "web" / "faces" / f"{number:02}.{suffix}").symlink_to(packed / f"train-00000.{suffix}")
        about["shards"].append({**entry, "rec": f"{number:02}.rec", "idx": f"{number:02}.idx"})
    about["images"] = 40 * entry["images"]
    (tmp_path / "web" / "faces" / "dataset.json").write_text(json.dumps(about))
    web = WebServer(tmp_path / "web")
    web.trouble = lambda number, path: "slow" if len(shards_asked(web)) > 80 and path.endswith(".rec") else None
    done = subprocess.run(
        [sys.executable, "-c", END, f"{web.url}/faces", str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stdout) == (0, "asked\n"), done.stderr
    assert len(shards_asked(web)) < 110  # 80 to open the shards; with all that was asked for ahead they are 120
    web.close()


def first_label(remote: RecordDataset, answer: Any) -> None:
    answer.put(remote.label(1000))


def test_a_forked_process_reads_on(web: WebServer, packed: Path, tmp_path: Path) -> None:
    remote = RecordDataset.open(f"{web.url}/faces", remote=options(tmp_path))
    remote.label(0)
    context = multiprocessing.get_context("fork")
    answer = context.SimpleQueue()
    process = context.Process(target=first_label, args=(remote, answer))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert answer.get() == RecordDataset.open(packed).label(1000)
