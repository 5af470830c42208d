"""Arrays that many processes want at once: made by one, never replaced while they are good, waited for with an end."""

import errno
import fcntl
import threading
from pathlib import Path

import numpy as np
import pytest

from pfc.data import array_cache
from pfc.data.array_cache import cached_arrays, store_arrays

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
