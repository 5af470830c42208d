"""Two hosts: network namespaces of this machine joined by one cable, each with its own torchrun agent.

Each host has namespaces of its own (network, host name, mounts, processes), so it has no interface but its end of the
cable and finds the other by name in its own /etc/hosts. The first process of a host ends when this one does, whatever
happens, and the kernel then ends all others of the host: nothing is left behind.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.commands import pfc
from tests.launch.test_train import losses

ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
OWN = ["unshare", "--net", "--uts", "--mount-proc", "--pid", "--fork", "--kill-child"]
CONFIG = """
run: {{name: tiny, dir: {runs}}}
data: {{train: {folder}/set, batch_size: 4, threads: 1}}
backbone: {{name: small, embedding_dim: 16, options: {{width: 8, norm: group}}}}
schedule: {{steps: 6, warmup_steps: 1}}
evaluation: {{pairs: []}}
log: {{every_steps: 1, tensorboard: false}}
"""


@dataclass
class Host:
    """One end of the cable."""

    name: str
    process: subprocess.Popen[str]

    @property
    def enter(self) -> list[str]:
        """What a command begins with to run on this host."""
        spaces = f"/proc/{self.process.pid}/ns"
        names = {"net": "net", "uts": "uts", "mount": "mnt", "pid": "pid_for_children"}
        return ["nsenter", *(f"--{name}={spaces}/{file}" for name, file in names.items()), f"--wd={os.getcwd()}", "--"]

    def run(self, *command: str) -> None:
        subprocess.run([*self.enter, *command], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why this machine cannot pretend to be two; empty when it can."""
    missing = [tool for tool in ("ip", "unshare", "nsenter") if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed"
    trial = [*OWN, "sh", "-c", "ip link add one type veth peer name other && mount --bind /etc/hosts /etc/hosts"]
    tried = subprocess.run(trial, capture_output=True, text=True, timeout=30)
    return f"no right to make network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[list[Host]]:
    if reason := why_not():
        pytest.skip(reason)
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{ADDRESSES[name]} {name}\n" for name in ADDRESSES))
    with ExitStack() as started:
        hosts = [start_host(name, names, started) for name in ADDRESSES]
        first, second = (str(host.process.pid) for host in hosts)
        cable = ["ip", "link", "add", "cable", "netns", first, "type", "veth", "peer", "name", "cable"]
        subprocess.run([*cable, "netns", second], check=True)
        for host in hosts:
            host.run("ip", "address", "add", f"{ADDRESSES[host.name]}/24", "dev", "cable")
            host.run("ip", "link", "set", "cable", "up")
            host.run("ip", "link", "set", "lo", "up")
        yield hosts


def start_host(name: str, names: Path, started: ExitStack) -> Host:
    """A process that holds the host's namespaces until its input is closed, which the end of this process does too."""
    life = f"hostname {name} && mount --bind {names} /etc/hosts && echo up && read line"
    process = subprocess.Popen([*OWN, "sh", "-c", life], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    started.enter_context(process)
    started.callback(process.kill)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return Host(name, process)


def torchrun(host: Host, *arguments: str) -> subprocess.Popen[str]:
    """Starts the agent of one host."""
    command = [*host.enter, sys.executable, "-m", "torch.distributed.run", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for name in ("GLOO_SOCKET_IFNAME", "MASTER_ADDR"):
        environment.pop(name, None)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_two_hosts_train_as_one_does(hosts: list[Host], folder: Path, tmp_path: Path):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(folder=folder, runs=tmp_path / "runs"), encoding="utf-8")
    assert pfc("train", config, "run.name=one", "--nproc", "2").exit_code == 0
    expected = losses(tmp_path / "runs/one")
    assert len(expected) == 6

    meet = ["--rdzv-backend=c10d", "--rdzv-endpoint=host-a:29400", "--rdzv-id=two"]
    training = ["-m", "pfc.launch.train", str(config), "run.name=two"]
    agents = [torchrun(host, "--nnodes=2", "--nproc-per-node=1", *meet, *training) for host in hosts]
    told = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(told)
    assert "over 2 rank(s)" in "".join(told)
    assert losses(tmp_path / "runs/two") == expected
