"""The Slurm script: what it starts, how it hands the warning on, and when it asks to be queued again.

Slurm's commands are stand-ins on PATH; torchrun is one too, except where a signal has to pass through the real one.
"""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import wait_until

SCRIPT = Path(__file__).parents[3] / "launch" / "slurm" / "train.sbatch"

SRUN = """#!{python}
# Runs the command once for each node, as tasks of a job step; hands a signal on to them.
import json, os, signal, subprocess, sys
arguments = sys.argv[1:]
start = next(place for place, argument in enumerate(arguments) if not argument.startswith("-"))
with open("{folder}/srun.json", "w") as file:
    json.dump(arguments[:start], file)
tasks = [
    subprocess.Popen(arguments[start:], env=os.environ | {{"SLURM_NODEID": str(node)}})
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"]))
]
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/usr/bin/env bash
case "$1" in
    show) printf 'node-1\\nnode-2\\n' ;;
    requeue) echo "$2" >> {folder}/requeued ;;
esac
"""
TORCHRUN = """#!{python}
import json, os, sys
names = ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "SRUN_CPUS_PER_TASK")
told = {{"arguments": sys.argv[1:], "environment": {{name: os.environ.get(name) for name in names}}}}
with open("{folder}/torchrun-" + os.environ["SLURM_NODEID"] + ".json", "w") as file:
    json.dump(told, file)
{act}
"""
WANTS_TO_GO_ON = 'open("{folder}/runs/photos/requeue", "w"); sys.exit(1)'
RANK = """
import os, pathlib, signal, sys
rank, folder = os.environ["RANK"], pathlib.Path("{folder}")
def stop(number, _):
    (folder / f"signal-{{rank}}").write_text(signal.Signals(number).name)
    if rank == "0":
        (folder / "runs/photos/requeue").touch()
    sys.exit(75)
signal.signal(signal.SIGUSR1, stop)
signal.alarm(240)
(folder / f"ready-{{rank}}").touch()
signal.pause()
"""


class Cluster:
    """A folder with stand-ins for Slurm's commands and torchrun, in which a job can be run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin = folder / "bin"
        self.bin.mkdir()
        (folder / "runs/photos").mkdir(parents=True)
        self.add("srun", SRUN)
        self.add("scontrol", SCONTROL)

    def add(self, name: str, text: str, **fields: str) -> None:
        path = self.bin / name
        path.write_text(text.format(folder=self.folder, python=sys.executable, **fields), encoding="utf-8")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def torchrun(self, act: str = "") -> None:
        """Makes torchrun write down how it was called, and then do this."""
        self.add("torchrun", TORCHRUN, act=act.format(folder=self.folder))

    def start(self, *arguments: str, nodes: int = 1, **environment: str) -> subprocess.Popen[str]:
        of_slurm = {
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NAME": "photos",
            "SLURM_JOB_NODELIST": f"node-[1-{nodes}]",
            "SLURM_JOB_NUM_NODES": str(nodes),
        }
        return subprocess.Popen(
            ["bash", str(SCRIPT), *arguments],
            env={"PATH": f"{self.bin}:{os.environ['PATH']}", **of_slurm, **environment},
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str, nodes: int = 1, **environment: str) -> int:
        job = self.start(*arguments, nodes=nodes, **environment)
        job.communicate(timeout=60)
        return job.returncode

    def called(self, node: int = 0) -> list[str]:
        """torchrun's arguments on a node."""
        return json.loads((self.folder / f"torchrun-{node}.json").read_text())["arguments"]

    @property
    def srun_options(self) -> list[str]:
        return json.loads((self.folder / "srun.json").read_text())

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def directives() -> dict[str, str]:
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH ")]
    return {name: value for name, _, value in (option.partition("=") for option in options)}


def test_the_script_is_sound_shell():
    for command in (["bash", "-n"], [Path(sys.executable).with_name("shellcheck"), "--severity=style"]):
        checked = subprocess.run([*command, SCRIPT], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr


def test_what_is_asked_of_slurm():
    asked = directives()
    assert asked["ntasks-per-node"] == "1"
    assert asked["signal"] == "USR1@300"  # to the steps' tasks, not to the batch shell
    assert "requeue" in asked
    assert asked["open-mode"] == "append"  # what was printed before a requeue stays


def test_one_node(cluster: Cluster):
    cluster.torchrun()
    assert cluster.run("photos.yaml", "data.batch_size=64", SLURM_GPUS_ON_NODE="4") == 0
    assert cluster.called() == [
        "--nnodes=1",
        "--nproc-per-node=4",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=node-1:24711",
        "--rdzv-id=4711-0",
        "--max-restarts=3",
        "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1",
        *("-m", "pfc.launch.train", "photos.yaml", "data.batch_size=64", "run.dir=runs", "run.name=photos"),
    ]
    assert "--ntasks-per-node=1" in cluster.srun_options
    environment = json.loads((cluster.folder / "torchrun-0.json").read_text())["environment"]
    assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert 30 < int(environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < 300  # Slurm ends the job 300 s after the warning


def test_two_nodes_call_the_same(cluster: Cluster):
    cluster.torchrun()
    assert cluster.run("photos.yaml", nodes=2, SLURM_GPUS_ON_NODE="8", SLURM_RESTART_COUNT="2") == 0
    assert cluster.called(0) == cluster.called(1)
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=node-1:24711", "--rdzv-id=4711-2"} <= set(
        cluster.called()
    )


def test_what_the_environment_changes(cluster: Cluster):
    cluster.torchrun()
    (cluster.folder / "photos.yaml").touch()
    changed = {
        "RUNS": f"{cluster.folder}/shared disk",
        "NPROC": "2",
        "MAX_RESTARTS": "0",
        "SRUN_OPTIONS": "--container-image=pfc.sqsh --container-mounts=/data",
        "IN_CONTAINER": "env INSIDE=1",
        "SLURM_CPUS_PER_TASK": "12",
    }
    assert cluster.run("photos.yaml", SLURM_GPUS_ON_NODE="8", **changed) == 0
    assert {"--nproc-per-node=2", "--max-restarts=0", f"run.dir={changed['RUNS']}"} <= set(cluster.called())
    assert {"--container-image=pfc.sqsh", "--container-mounts=/data"} <= set(cluster.srun_options)
    environment = json.loads((cluster.folder / "torchrun-0.json").read_text())["environment"]
    assert environment["SRUN_CPUS_PER_TASK"] == "12"


def test_a_node_without_gpus_runs_one_rank(cluster: Cluster):
    cluster.torchrun()
    assert cluster.run("photos.yaml") == 0
    assert "--nproc-per-node=1" in cluster.called()


def test_a_run_that_wants_to_go_on_is_queued_again(cluster: Cluster):
    cluster.torchrun(WANTS_TO_GO_ON)
    cluster.run("photos.yaml")
    assert cluster.requeued == ["4711"]


@pytest.mark.parametrize("code", [0, 1])
def test_a_run_that_ended_or_failed_is_not_queued_again(cluster: Cluster, code: int):
    (cluster.folder / "runs/photos/requeue").touch()  # the wish of an earlier start, which was granted
    cluster.torchrun(f"sys.exit({code})")
    assert cluster.run("photos.yaml") == code
    assert cluster.requeued == []


def test_without_a_configuration_nothing_is_started(cluster: Cluster):
    cluster.torchrun()
    assert cluster.run() == 2
    assert not (cluster.folder / "srun.json").exists()


def test_the_warning_reaches_every_rank_through_torchrun(cluster: Cluster):
    """The real torchrun, with two ranks that wait for the signal in place of a training run."""
    (cluster.folder / "rank.py").write_text(RANK.format(folder=cluster.folder), encoding="utf-8")
    act = (
        'place = sys.argv.index("-m"); os.execv(sys.executable, [sys.executable, "-m", "torch.distributed.run",'
        ' *sys.argv[1:place], "--local-addr=127.0.0.1", "{folder}/rank.py"])'
    )
    cluster.torchrun(act)
    cluster.add("scontrol", SCONTROL.replace("node-1\\nnode-2", "localhost"))
    job = cluster.start("photos.yaml", NPROC="2")
    try:
        await_ranks(cluster, job)
        srun = child_of(job.pid)
        os.kill(srun, signal.SIGUSR1)
        out, error = job.communicate(timeout=60)
    finally:
        job.kill()
    assert [(cluster.folder / f"signal-{rank}").read_text() for rank in (0, 1)] == ["SIGUSR1"] * 2, error
    assert job.returncode == 1
    assert cluster.requeued == ["4711"]
    assert "back into the queue" in out


def await_ranks(cluster: Cluster, job: subprocess.Popen[str]) -> None:
    ready = [cluster.folder / f"ready-{rank}" for rank in (0, 1)]
    wait_until(lambda: job.poll() is not None or all(path.exists() for path in ready), 120)
    assert job.poll() is None, job.communicate()


def child_of(parent: int) -> int:
    """The one process that this one has started and that still runs."""
    (child,) = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return int(child)
