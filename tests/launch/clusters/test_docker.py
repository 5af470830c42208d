"""The image's recipe: its form, what it is built from, who runs it, and the versions that it installs."""

import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from docker.utils.build import exclude_paths
from dockerfile_parse import DockerfileParser
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
ROOMS = ("partial_fc", "data", "engine", "launch", "benchmarks", "configs")


def recipe() -> DockerfileParser:
    return DockerfileParser(str(ROOT / "docker" / "Dockerfile"))


def instructions(*, last_stage: bool = True) -> list[tuple[str, str]]:
    """(name, value) of every instruction, of the last stage or of all."""
    found = [(step["instruction"], step["value"]) for step in recipe().structure if step["instruction"] != "COMMENT"]
    if last_stage:
        found = found[max(place for place, (name, _) in enumerate(found) if name == "FROM") :]
    return found


def environment() -> dict[str, str]:
    """What ENV sets in the last stage."""
    text = " ".join(value for name, value in instructions() if name == "ENV")
    return dict(entry.split("=", 1) for entry in text.split())


def values(name: str, *, last_stage: bool = True) -> list[str]:
    return [value for instruction, value in instructions(last_stage=last_stage) if instruction == name]


@pytest.fixture(scope="module")
def context() -> set[str]:
    """Files that the build sees: all but what .dockerignore leaves out."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    return {path for path in exclude_paths(str(ROOT), patterns) if (ROOT / path).is_file()}


def test_the_linter_has_nothing_to_say():
    linter = Path(sys.executable).with_name("hadolint")
    checked = subprocess.run([linter, ROOT / "docker" / "Dockerfile"], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_the_base_is_pinned_by_tag_and_digest():
    (base,) = [value for value in values("ARG", last_stage=False) if "=" in value]
    assert re.fullmatch(r"BASE=nvidia/cuda:13\.0\.\d+-base-ubuntu24\.04@sha256:[0-9a-f]{64}", base)
    stages = [value.split()[0] for value in values("FROM", last_stage=False)]
    assert stages == ["${BASE}", "python", "python"]


def test_what_is_copied_is_in_the_context(context: set[str]):
    sources = [source for value in values("COPY", last_stage=False) for source in value.split()[:-1]]
    assert {*ROOMS, "docs"} <= set(sources)
    for source in sources:
        assert any(path == source or path.startswith(f"{source}/") for path in context), source


def test_the_context_holds_the_code_and_nothing_else(context: set[str]):
    code = {
        str(path.relative_to(ROOT))
        for room in ROOMS
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    code |= {str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md")}
    about = {"LICENSE", "README.md", "pyproject.toml", "setup.py", "docker/constraints.txt"}
    # docker takes its own two files along, whatever is said.
    assert context - {".dockerignore", "docker/Dockerfile"} == code | about
    assert sum((ROOT / path).stat().st_size for path in context) < 5_000_000


def test_a_plain_user_runs_it():
    (user,) = values("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)  # by number: so Kubernetes can tell that it is not root
    after = instructions()[[name for name, _ in instructions()].index("USER") :]
    assert [
        name for name, _ in after if name not in ("USER", "WORKDIR", "RUN", "HEALTHCHECK", "ENTRYPOINT", "CMD")
    ] == []
    assert values("ENTRYPOINT") == ['["pfc"]']


def test_the_build_ends_with_a_smoke_test_by_that_user():
    names = [name for name, _ in instructions()]
    trials = [place for place, (name, value) in enumerate(instructions()) if name == "RUN" and "pfc doctor" in value]
    assert trials
    assert min(trials) > names.index("USER")


def test_the_environment_that_torchrun_needs():
    assert environment()["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert int(environment()["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) >= 300


def test_the_last_stage_installs_what_is_pinned_and_nothing_else():
    for command in values("RUN"):
        for install in re.findall(r"pip install [^&|]*", command):
            assert "--no-deps" in install, install


def pins() -> dict[str, str]:
    lines = (ROOT / "docker" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    entries = [line.split("==") for line in lines if not line.startswith("#")]
    assert [name for name, _ in entries] == sorted({name for name, _ in entries})
    return dict(entries)


def test_every_requirement_of_pfc_is_pinned_to_a_version_that_it_takes():
    pinned = pins()
    wanted = [Requirement(line) for line in requires("pfc") or []]
    needed = [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": "cuda13"})]
    assert {"torch", "nvidia-dali-cuda130"} <= {need.name for need in needed}
    for need in needed:
        assert need.name.lower() in pinned, need
        assert need.specifier.contains(pinned[need.name.lower()]), need
