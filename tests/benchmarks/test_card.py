"""``python benchmarks/gpu`` as it is run on a machine that has torch and Triton and nothing else of pfc's, in small."""

import json
import subprocess
import sys
from pathlib import Path

from tests.benchmarks.test_head import stand_in
from tests.commands import Command, run_script

ROOT = Path(__file__).resolve().parents[2]

BARE = """
import builtins, runpy, sys
from importlib.machinery import PathFinder

rooms = tuple(f"{sys.argv[1]}/{room}/" for room in ("data", "engine", "launch", "partial_fc", "benchmarks"))
sys.argv = sys.argv[2:]
allowed = sys.stdlib_module_names | {"torch", "triton", "pfc"}
absent = {"pydantic", "typer", "rich", "yaml", "nvidia.dali", "PIL", "cv2", "sklearn", "matplotlib", "tensorboard"}
import_module, find_spec = builtins.__import__, PathFinder.find_spec

def bare_import(name, globals=None, locals=None, fromlist=(), level=0):
    file = str((globals or {}).get("__file__", ""))
    if level == 0 and name.partition(".")[0] not in allowed and file.startswith(rooms):
        raise ModuleNotFoundError(f"{file} imports {name}")
    return import_module(name, globals, locals, fromlist, level)

def bare_find_spec(name, path=None, target=None):
    return None if name in absent else find_spec(name, path, target)

builtins.__import__, PathFinder.find_spec = bare_import, bare_find_spec
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Files of pfc can import the standard library, torch and Triton; pfc's other requirements are absent to everybody."""


def test_every_part_runs_with_torch_and_triton_alone(tmp_path: Path) -> None:
    small = ["--device", "cpu", "--classes", "60", "--dim", "16", "--batch", "8", "--rates", "0.5", "--steps", "2"]
    command = [sys.executable, "-c", BARE, str(ROOT), "benchmarks/gpu", *small]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--peer", stand_in(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [line.split()[1].rstrip(":") for line in done.stdout.splitlines() if line.startswith("-- ")]
    assert parts == ["ceilings", "sweep", "steps", "profile"]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found.keys() == {
        "device", "torch", "triton", "options", "failures", "steps", "bf16_tflops", "bandwidth_tbps", "sweep",
    }  # fmt: skip
    assert found["failures"] == []
    assert found["sweep"].keys() == {"tiles", "best", "blocks"}
    heads = ["pfc", "pfc, p recomputed", "pfc, plain path", "peer", "peer, fp16"]
    lines = [(entry["head"], entry["rate"]) for entry in found["steps"]]
    assert lines == [*((head, 0.5) for head in heads), ("dense", 1.0)]
    assert all(entry.keys() == {"head", "rate", "ms", "times", "peak", "share_of_bf16"} for entry in found["steps"])
    assert all(len(entry["times"]) == 2 for entry in found["steps"])


def test_parts_are_left_out_when_the_time_is_up(tmp_path: Path) -> None:
    done = Command(bench_gpu, "--device", "cpu", "--seconds", "0", "--out", str(tmp_path), folder=ROOT).wait(300)
    assert done.exit_code == 0, done.output
    assert "skipped, the time is up: ceilings" in done.out
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"] == []


def bench_gpu(*arguments: str) -> None:
    sys.argv[1:] = arguments
    run_script("benchmarks/gpu")
