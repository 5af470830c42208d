"""Worker processes: order, errors, memory, and scripts that start them without a main guard."""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from pfc.data.packing.pack import pack_folder
from pfc.data.workers import parallel_map
from tests.data.packing.packed import files_of, make_source


def square_unless_three(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number * number


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("processes", [1, 2])
def test_parallel_map_keeps_order_and_raises_what_a_worker_raises(processes: int) -> None:
    assert list(parallel_map(square_unless_three, range(4, 40), workers=processes, chunk=2)) == [
        number * number for number in range(4, 40)
    ]
    with pytest.raises(ValueError, match="three"):
        list(parallel_map(square_unless_three, range(10), workers=processes, chunk=2))


def test_parallel_map_survives_a_killed_worker() -> None:
    with pytest.raises(RuntimeError, match="worker process died"):
        list(parallel_map(die_at_three, range(10), workers=2, chunk=1))


def made(task: tuple[int, int], calls: Path) -> bytes:
    """A result of so many bytes, which leaves a trace."""
    number, size = task
    (calls / str(number)).touch()
    return bytes(size)


def test_parallel_map_keeps_few_bytes_however_large_the_results_become(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pfc.data.workers.IN_FLIGHT", 6 << 20)
    sizes = [10] * 300 + [1 << 20] * 60 + [10] * 300
    results = parallel_map(partial(made, calls=tmp_path), enumerate(sizes), workers=2)
    for taken, (result, size) in enumerate(zip(results, sizes, strict=True), start=1):
        assert len(result) == size
        if size > 10:
            ready = sum(sizes[number] for number in map(int, os.listdir(tmp_path)) if number >= taken)
            # Six chunks in flight, one of them taken apart here, and each may have one result too many.
            assert ready <= (6 + 7) << 20
    assert len(os.listdir(tmp_path)) == len(sizes)


@pytest.mark.parametrize(
    "call",
    [
        "pack_folder({src!r}, {out!r}, size=16, workers=2)",
        "pack_recordio({old!r}, {out!r}, workers=2)",
        "pack_synthetic({out!r}, identities=2, images_per_identity=2, workers=2)",
        "pack_glyphs({out!r}, identities=4, heldout_identities=4, heldout_pairs=4, images_per_identity=4, workers=2)",
    ],
)
def test_a_script_without_a_guard_is_told_of_it(call: str, tmp_path: Path) -> None:
    src = make_source(tmp_path / "src")
    pack_folder(src, tmp_path / "old", size=16, workers=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    script = tmp_path / "script.py"
    script.write_text(
        "from pfc.data import pack_folder, pack_glyphs, pack_recordio, pack_synthetic\n"
        + call.format(src=str(src), old=str(tmp_path / "old"), out=str(tmp_path / "out"))
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.count("Traceback") == 1  # this script's own
    last = run.stderr.splitlines()[-1]
    assert last.startswith("pfc.data.errors.UsageError: ")
    assert 'if __name__ == "__main__":' in last
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "script.py"])


def test_a_script_with_a_guard_packs(tmp_path: Path) -> None:
    src = make_source(tmp_path / "src")
    script = tmp_path / "script.py"
    call = f"pack_folder({str(src)!r}, {str(tmp_path / 'out')!r}, size=16, workers=2)"
    script.write_text(f'from pfc.data import pack_folder\nif __name__ == "__main__":\n    {call}\n')
    subprocess.run([sys.executable, script], check=True)
    assert (tmp_path / "out").is_dir()


def test_a_script_without_a_guard_loses_no_interrupted_packing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    src = make_source(tmp_path / "src")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pfc.data.packing.run.SAVE_EVERY", 0.0)
    with pytest.raises(KeyboardInterrupt):
        pack_folder(src, tmp_path / "out", size=16, workers=1, progress=interrupt)
    left = files_of(tmp_path / ".out.partial")
    assert left
    script = tmp_path / "script.py"
    script.write_text(
        f"from pfc.data import pack_folder\npack_folder({str(src)!r}, {str(tmp_path / 'out')!r}, size=16)\n"
    )
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert "__main__" in run.stderr.splitlines()[-1]
    assert files_of(tmp_path / ".out.partial").keys() >= left.keys()
    assert pack_folder(src, tmp_path / "out", size=16, workers=1).resumed_at > 0
