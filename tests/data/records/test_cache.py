"""Arrays that many processes want at once: made by one, never replaced while they are good, waited for with an end."""

import errno
import fcntl
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from pfc.data.order import balanced
from pfc.data.order.balanced import BalancedOrder, group_by_identity, groups_of
from pfc.data.records import all_labels, index
from pfc.data.records import cache as array_cache
from pfc.data.records.cache import cached_arrays, store_arrays
from pfc.data.records.dataset import RecordDataset
from pfc.data.records.joint import JointDataset
from pfc.data.records.recordio import RecordWriter, pack_image
from tests.data.records.test_index import grow_old, mapped, write

ABOUT = {"what": "numbers"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def test_one_makes_what_all_take(tmp_path: Path) -> None:
    made: list[int] = []
    another_makes = threading.Event()

    def make() -> list[np.ndarray]:
        made.append(len(made))
        if len(made) > 1:
            another_makes.set()
        another_makes.wait(0.5)
        return [np.arange(1000)]

    found: list[int] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(int(cached_arrays(tmp_path / "a.cache", ABOUT, [], make)[0].sum()))
        )
        for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [0]
    assert found == [499500] * 6
    assert [path.name for path in tmp_path.iterdir()] == ["a.cache"], "no lock stays"


def test_a_good_cache_that_appeared_meanwhile_is_taken_and_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    theirs: list[int] = []

    def make() -> list[np.ndarray]:
        store_arrays(path, ABOUT, [np.arange(1000)])  # another host, whose locks this one does not see
        theirs.append(path.stat().st_ino)
        return [np.arange(1000)]

    arrays = cached_arrays(path, ABOUT, [], make)
    assert arrays[0].tolist() == list(range(1000))
    assert not arrays[0].flags.owndata
    assert [path.stat().st_ino] == theirs, "others may have it mapped"
    assert [path.name for path in tmp_path.iterdir()] == ["a.cache"]


def test_storing_again_leaves_a_good_cache_alone_and_mends_a_damaged_one(tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    store_arrays(path, ABOUT, [np.arange(1000)])
    first = path.stat().st_ino
    assert store_arrays(path, ABOUT, [np.arange(1000)]) is not None
    assert path.stat().st_ino == first
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    arrays = store_arrays(path, ABOUT, [np.arange(1000)])
    assert arrays is not None
    assert arrays[0].tolist() == list(range(1000))
    assert path.stat().st_ino != first


def test_nobody_waits_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(array_cache, "PATIENCE", 0.0)
    with (tmp_path / ".a.cache.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        arrays = cached_arrays(tmp_path / "a.cache", ABOUT, [], lambda: [np.arange(1000)])
    assert arrays[0].tolist() == list(range(1000))


def test_a_file_system_without_locks_has_caches_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    arrays = cached_arrays(tmp_path / "a.cache", ABOUT, [], lambda: [np.arange(1000)])
    assert not arrays[0].flags.owndata
    assert [path.name for path in tmp_path.iterdir()] == ["a.cache"]


@pytest.mark.parametrize("joint", [False, True])
def test_balanced_orders_of_all_ranks_share_their_groups(
    joint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [write(tmp_path / name) for name in "ab"]
    dataset = JointDataset.open(folders if joint else folders[:1])
    labels = dataset.labels(damaged=-1)
    options = {"identities": 4, "images": 3}
    expected = BalancedOrder(group_by_identity(labels), 0, **options).at(np.arange(600))
    own = BalancedOrder(groups_of(dataset), 0, **options).at(np.arange(600))
    monkeypatch.setattr(array_cache, "store_arrays", None)
    for kind in (JointDataset, RecordDataset):
        monkeypatch.setattr(kind, "labels", None)  # nothing is read or sorted again
    groups = groups_of(JointDataset.open(folders if joint else folders[:1]))
    assert all(mapped(array) for array in groups)
    found = BalancedOrder(groups, 0, **options).at(np.arange(600))
    assert found.tolist() == own.tolist() == expected.tolist()
    assert found.dtype == np.int64


def test_the_groups_of_a_set_that_changed_are_made_anew(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    before = groups_of(RecordDataset.open(folder))
    with RecordWriter(tmp_path / "b.rec") as writer:
        for key in range(20_000):
            writer.write(key, pack_image(float(key % 5), b"%d\xff\xd9" % key, id=key))
    for name in ("rec", "idx"):
        (tmp_path / f"b.{name}").replace(folder / f"a.{name}")
    grow_old(folder)
    assert len(before.counts) == 7
    assert len(groups_of(RecordDataset.open(folder)).counts) == 5


def test_who_makes_arrays_for_long_is_waited_for_while_it_shows_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(array_cache, "PATIENCE", 0.4)
    made: list[int] = []

    def make() -> list[np.ndarray]:
        made.append(len(made))
        time.sleep(0.9)
        return [np.arange(1000)]

    def take() -> None:
        cached_arrays(tmp_path / "a.cache", ABOUT, [], make)

    threads = [threading.Thread(target=take) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["a.cache"]


def test_versions_of_the_content_keep_caches_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "a")
    groups_of(RecordDataset.open(folder))
    before = {path.name: path.stat().st_ino for path in folder.iterdir()}
    with monkeypatch.context() as later:
        for module in (index, all_labels, balanced):
            later.setattr(module, "_VERSION", 99)
        groups_of(RecordDataset.open(folder))
    groups_of(RecordDataset.open(folder))
    after = {path.name: path.stat().st_ino for path in folder.iterdir()}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 3
