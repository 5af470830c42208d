"""The wheel holds what it must and nothing else, and works where the checkout is not."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("partial_fc", "data", "engine", "launch", "benchmarks", "configs")

STEP = ROOT / "tests" / "one_step.py"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout stays as it is and an older build cannot slip in."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout(folder / "checkout")
    build(folder / "checkout", folder)
    (built,) = folder.glob("*.whl")
    return built


def checkout(folder: Path) -> None:
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)


def build(source: Path, out: Path, **variables: str) -> None:
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    run(*command, cwd=out, **variables)


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` of a virtual environment with the wheel; the libraries that it needs are borrowed from this one."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel), cwd=folder)
    (site_packages,) = (folder / "lib").glob("python*/site-packages")
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def run(*command: str, cwd: Path, **more: str) -> str:
    """Its stdout; fails with its stderr. Nothing of this process's Python settings reaches it."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")} | more
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_and_nothing_at_top_level(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {name.split("/")[0] for name in names} == {"pfc", "pfc-0.1.0.dist-info"}
    assert "pfc/__init__.py" not in names  # a namespace
    modules = {f"pfc/{path.relative_to(ROOT)}" for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert modules - set(names) == {"pfc/launch/pfc/__main__.py"}  # that is
    assert "pfc/__main__.py" in names
    assert {f"pfc/{room}/py.typed" for room in ROOMS} <= set(names)  # for type checkers
    pages = {f"pfc/docs/{path.name}" for path in (ROOT / "docs").glob("*.md")}
    assert {name for name in names if name.startswith("pfc/docs/")} == pages
    assert any(name.endswith("LICENSE") for name in names)
    if shutil.which("gcc"):
        assert any(name.startswith("pfc/partial_fc/kernels/_native.") for name in names)
        assert any(name.startswith("pfc/data/loading/_plain.") for name in names)


def test_dali_comes_with_an_extra_and_only_one_of_them(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        about = message_from_bytes(archive.read("pfc-0.1.0.dist-info/METADATA"))
    needs = [Requirement(line) for line in about.get_all("Requires-Dist", [])]

    def dali(extra: str) -> list[str]:
        wanted = [need for need in needs if need.marker is None or need.marker.evaluate({"extra": extra})]
        return [need.name for need in wanted if "dali" in need.name]

    assert dali("") == []
    assert dali("cuda12") == ["nvidia-dali-cuda120"]
    assert dali("cuda13") == dali("all") == ["nvidia-dali-cuda130"]


def test_without_a_compiler_the_wheel_is_built_all_the_same_and_trains(tmp_path: Path):
    checkout(tmp_path / "checkout")
    build(tmp_path / "checkout", tmp_path, CC="no-such-compiler")
    (built,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        assert not any(name.endswith(".so") for name in archive.namelist())
        archive.extractall(tmp_path / "installed")
    said = run(sys.executable, str(STEP), cwd=tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    assert said == f"trained with {tmp_path}/installed/pfc/partial_fc/__init__.py\n"


def test_the_wheels_to_publish():
    """Which ones cibuildwheel would build."""
    command = [sys.executable, "-m", "cibuildwheel", "--platform", "linux", "--print-build-identifiers"]
    wanted = [f"cp3{minor}-manylinux_{arch}" for minor in (11, 12, 13, 14) for arch in ("x86_64", "aarch64")]
    assert sorted(run(*command, cwd=ROOT).split()) == sorted(wanted)


def test_a_published_wheel_passes_its_trial(environment: Path, tmp_path: Path):
    """What cibuildwheel runs in each container, with this wheel."""
    trials = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["cibuildwheel"]
    said = [
        run("sh", "-c", trial.format(project=ROOT), cwd=tmp_path, PATH=f"{environment}:{os.environ['PATH']}")
        for trial in trials["test-command"]
    ]
    (site_packages,) = environment.parent.glob("lib/python*/site-packages")
    assert said == ["pfc 0.1.0\n", f"trained with {site_packages}/pfc/partial_fc/__init__.py\n"]


def test_a_type_checker_knows_the_package(environment: Path, tmp_path: Path):
    """A user's script: right types pass, wrong ones do not."""
    (tmp_path / "user.py").write_text(
        "from pfc.data import RecordDataset\n"
        "from pfc.partial_fc import PartialFC, RowSGD, objectives\n"
        "head = PartialFC(9, 4, objective=objectives.CosFace(scale=16.0))\n"
        "rate: float = RowSGD(head, lr=0.1).defaults['lr']\n"
        "images: int = len(RecordDataset.open('set'))\n"
        "wrong: str = objectives.names()\n"
    )
    command = [sys.executable, "-m", "pyright", "--pythonpath", str(environment / "python"), "--outputjson"]
    checked = subprocess.run([*command, "user.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    problems = json.loads(checked.stdout)["generalDiagnostics"]
    assert [(one["rule"], one["range"]["start"]["line"]) for one in problems] == [("reportAssignmentType", 5)], problems


def test_the_wheel_works_from_anywhere(environment: Path, tmp_path: Path):
    """That the head is the wheel's too, the trial above shows."""
    assert run(str(environment / "pfc"), "--version", cwd=tmp_path) == "pfc 0.1.0\n"
    assert run(str(environment / "python"), "-m", "pfc", "--version", cwd=tmp_path) == "pfc 0.1.0\n"
    assert "Usage: pfc" in run(str(environment / "pfc"), "--help", cwd=tmp_path)
    assert run(str(environment / "pfc"), "help", "data", cwd=tmp_path).startswith("# Data\n")
    assert run(str(environment / "pfc"), "help", "machines", cwd=tmp_path).startswith("# Starting training runs\n")
    code = "import pfc.data, pfc.engine, pfc.launch.cli, pfc; print(*pfc.__path__, pfc.data.__file__)"
    for path in run(str(environment / "python"), "-c", code, cwd=tmp_path).split():
        assert Path(path).is_relative_to(environment.parent), path


def test_the_installed_command_packs_and_inspects(environment: Path, tmp_path: Path):
    pfc = str(environment / "pfc")
    run(
        pfc, "pack", "synthetic", "set", "--identities", "2", "--images-per-identity", "2", "--size", "16", cwd=tmp_path
    )
    assert '"images": 4' in run(pfc, "inspect", "set", "--json", cwd=tmp_path)


def test_the_editable_installation_works_from_anywhere(tmp_path: Path):
    """That the head is the checkout's too, the test below shows."""
    code = "import pfc.launch.cli; print(pfc.launch.cli.__file__)"
    where = Path(run(sys.executable, "-c", code, cwd=tmp_path).strip())
    assert where == ROOT / "launch" / "cli.py"
    assert run(sys.executable, "-m", "pfc", "--version", cwd=tmp_path) == "pfc 0.1.0\n"
    assert run(sys.executable, "-m", "pfc", "--version", cwd=ROOT) == "pfc 0.1.0\n"


def test_the_head_needs_torch_alone(tmp_path: Path):
    code = '''
import sys
import torch

class Without:
    """Finds what ``finder`` finds, except the other rooms of pfc and the libraries that only those need."""

    others = ("pydantic", "yaml", "typer", "rich", "nvidia.dali", "matplotlib", "sklearn", "PIL", "tensorboard")
    rooms = ("pfc.data", "pfc.engine", "pfc.launch", "pfc.benchmarks")

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        hidden = any(name == other or name.startswith(other + ".") for other in self.others + self.rooms)
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]

'''
    said = run(sys.executable, "-c", code + STEP.read_text(encoding="utf-8"), cwd=tmp_path)
    assert said == f"trained with {ROOT}/partial_fc/__init__.py\n"
