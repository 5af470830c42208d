"""``pfc doctor``: what this machine has, what works, and what to do about what does not."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from .machine import usable_cores

GIB = 2**30


@dataclass
class Check:
    """One line of the doctor's table."""

    name: str
    status: Literal["ok", "warning", "missing"]
    found: str
    advice: str = ""
    essential: bool = False
    """Whether nothing can be trained here while the status is ``missing``."""


def examine() -> list[Check]:
    """Looks at everything; takes some seconds, for the trials really run."""
    with ThreadPoolExecutor() as trials:  # each trial is a process of its own
        running = [trials.submit(trial) for trial in (_dali, _triton, _gloo)]
        checks = [*_versions(), *_devices(), _nccl(), *_machine()]
        return checks + [trial.result() for trial in running]


def is_fit(checks: list[Check]) -> bool:
    """Whether nothing essential is missing."""
    return not any(check.essential and check.status == "missing" for check in checks)


def as_json(checks: list[Check]) -> dict[str, object]:
    return {"ok": is_fit(checks), "checks": [asdict(check) for check in checks]}


def _versions() -> list[Check]:
    import torch

    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
    return [
        Check("pfc", "ok", importlib.metadata.version("pfc")),
        Check("Python", "ok", f"{platform.python_version()} ({sys.prefix})"),
        Check("PyTorch", "ok", f"{torch.__version__}, {cuda}"),
    ]


def _devices() -> list[Check]:
    import torch

    driver = _driver()
    if torch.cuda.is_available():
        checks = [Check("driver", "ok", driver or "found (nvidia-smi is not installed)")]
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            found = f"{device.name}, {device.total_memory / GIB:.0f} GiB, compute {device.major}.{device.minor}"
            if device.major < 8:
                checks.append(Check(f"GPU {index}", "warning", found, "no fast bf16 here: train with precision=fp16"))
            else:
                checks.append(Check(f"GPU {index}", "ok", found))
        return checks
    if driver is None:
        return [Check("GPU", "warning", "none: training runs on the CPU", "fine for trying out and for small sets")]
    advice = (
        "install a PyTorch whose CUDA this driver serves (nvidia-smi shows the newest it can), or update the driver"
    )
    return [Check("GPU", "missing", f"driver {driver} is there, but PyTorch finds no GPU", advice)]


def _driver() -> str | None:
    """The NVIDIA driver's version; None without a driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return "that does not answer"
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None


def _nccl() -> Check:
    import torch
    import torch.distributed as dist
    from torch.cuda import nccl

    if dist.is_nccl_available():
        return Check("NCCL", "ok", ".".join(map(str, nccl.version())))
    if torch.cuda.is_available():
        return Check("NCCL", "missing", "not in this PyTorch", "several GPUs need it: install PyTorch's own CUDA build")
    return Check("NCCL", "ok", "not in this PyTorch; not needed without a GPU")


def _machine() -> list[Check]:
    cores = usable_cores()
    memory = _memory()
    checks = [
        Check("cores", "ok", f"{cores} of {os.cpu_count()} usable"),
        Check("memory", "ok", f"{memory / GIB:.0f} GiB")
        if memory >= 4 * GIB
        else Check("memory", "warning", f"{memory / GIB:.1f} GiB", "a rank needs 1 to 2 GiB: use --nproc 1"),
        _bf16_on_cpu(),
        _compiled_passes(),
    ]
    disk = shutil.disk_usage(Path.cwd()).free
    advice = "" if disk >= 10 * GIB else "a run keeps several checkpoints: set run.dir to a larger disk"
    checks.append(Check("disk here", "warning" if advice else "ok", f"{disk / GIB:.0f} GiB free", advice))
    shared = Path("/dev/shm")
    if shared.exists():
        size = shutil.disk_usage(shared).total
        advice = (
            "" if size >= GIB else "ranks on one machine exchange through it: docker run --shm-size=8g, or --ipc=host"
        )
        checks.append(
            Check("shared memory", "warning" if advice else "ok", f"{size / GIB:.1f} GiB in /dev/shm", advice)
        )
    return checks


def _memory() -> int:
    """Bytes that this process may use: the machine's, or the container's where that is less."""
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    if group.exists() and (text := group.read_text().strip()).isdigit():
        limit = min(limit, int(text))
    return limit


def _bf16_on_cpu() -> Check:
    """What a product in bfloat16 does and takes here, measured: flags do not tell."""
    import torch

    from ..partial_fc.kernels.products import rounds_to_bfloat16

    single = torch.ones(512, 512)
    half = single.bfloat16()
    faster = _seconds(lambda: single @ single) / _seconds(lambda: half @ half)
    head = "in bfloat16" if rounds_to_bfloat16(torch.device("cpu")) else "in float32 all the same"
    found = f"products {faster:.2g} × as fast as float32; the head's are made {head}"
    return Check("bf16 on CPU", "ok", found if faster > 1.2 else f"{found}: precision=float32 is the better one here")


def _seconds(function: Callable[[], object], times: int = 4) -> float:
    """The shortest of a few calls after one that warms up."""
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        function()
        taken.append(time.perf_counter() - start)
    return min(taken[1:])


def _compiled_passes() -> Check:
    from ..data.loading import plain
    from ..partial_fc.kernels import native

    name = "compiled passes"
    passes = {"the head's": native.passes(), "the data's": plain.compiled()}
    missing = " and ".join(whose for whose, found in passes.items() if found is None)
    if not missing:
        return Check(name, "ok", "the head's and the data's, for this processor")
    if os.environ.get("PFC_COMPILED") == "0":
        return Check(name, "warning", "turned off by PFC_COMPILED=0", "unset it: training on a CPU is slower without")
    advice = "training on a CPU is slower without: install a C compiler (gcc), then pfc again"
    return Check(name, "warning", f"{missing} are missing: pfc was installed without a C compiler", advice)


def _dali() -> Check:
    from ..data.loading.dali import how_to_install

    found = {name: _package_version(name) for name in ("nvidia-dali-cuda130", "nvidia-dali-cuda120")}
    there = [name for name, version in found.items() if version is not None]
    if not there:
        advice = f"it decodes all images, without a GPU too: {how_to_install()}"
        return Check("DALI", "missing", "not installed", advice, essential=True)
    if len(there) == 2:
        advice = f"they overwrite each other: pip uninstall {' '.join(there)}, then {how_to_install()}"
        return Check("DALI", "warning", "for CUDA 12 and for CUDA 13", advice)
    advice = f"reinstall it: pip install --force-reinstall {there[0]}"
    return _trial("DALI", "dali", f"{found[there[0]]}", advice, essential=True)


def _triton() -> Check:
    version = _package_version("triton")
    if version is None:
        return Check(
            "Triton", "warning", "not installed", "pfc runs without it; GPU kernels want it: pip install triton"
        )
    advice = "GPU kernels need it, and a C compiler: apt-get install gcc, or pip install --force-reinstall triton"
    return _trial("Triton", "triton", version, advice, essential=False)


def _gloo() -> Check:
    advice = "several ranks on the CPU need the loopback interface: check that 127.0.0.1 answers and is not firewalled"
    return _trial("gloo", "gloo", "", advice, essential=True)


def _trial(name: str, probe: str, version: str, advice: str, *, essential: bool) -> Check:
    seconds = 120
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pfc.launch.probes", probe], capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Check(name, "missing", f"{version} did not answer within {seconds} s".strip(), advice, essential)
    if done.returncode == 0:
        return Check(name, "ok", ", ".join(filter(None, [version, done.stdout.strip().split("\n")[-1]])))
    last = (done.stderr.strip() or f"exit code {done.returncode}").split("\n")[-1]
    return Check(name, "missing", f"{version} fails: {last}".strip(), advice, essential)


def _package_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
