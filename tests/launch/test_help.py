"""``pfc help`` shows the pages; a shell completes what may come next."""

import os
import pty
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pfc.launch.cli import main, verbs
from pfc.launch.verbs.help import topics

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["help", *arguments]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line."""
    assert main(["help", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    return line


# pfc help


def test_every_page_is_a_topic_and_says_what_it_is_about(capsys: pytest.CaptureFixture[str]):
    lines = dict(line.split(maxsplit=1) for line in told(capsys).splitlines())
    assert set(lines) == {page.stem for page in (ROOT / "docs").glob("*.md")} | {"machines"}
    assert lines["data"] == "pfc trains from RecordIO shards: a few large files, read in any order"
    assert not set(lines) & set(verbs())  # pfc help VERB is that verb's help


def test_a_page_is_plain_text_where_it_is_piped(capsys: pytest.CaptureFixture[str]):
    assert told(capsys, "data") == (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert told(capsys, "machines") == (ROOT / "launch" / "README.md").read_text(encoding="utf-8")


def test_a_section_by_the_words_of_its_heading(capsys: pytest.CaptureFixture[str]):
    """However they are written; with what is below it."""
    text = told(capsys, "objectives", "sphereface2")
    assert text.startswith("### SphereFace2\n")
    assert text.count("\n#") == 0
    text = told(capsys, "objectives", "hard", "Negatives")
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        *("## Hard negatives", "### CurricularFace", "### MV-Softmax", "### Inter-top-K")
    ]
    assert "# train_focal.py" in told(capsys, "objectives", "adding one")  # a comment of its code, and no heading


def test_words_that_no_heading_has_are_looked_for_in_the_text(capsys: pytest.CaptureFixture[str]):
    text = told(capsys, "failures", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" in text
    assert len(text) < len(topics()["failures"].read_text(encoding="utf-8")) / 2


def test_a_wrong_topic_names_those_that_are_near(capsys: pytest.CaptureFixture[str]):
    assert "did you mean objectives?" in refused(capsys, "objektives")
    assert "did you mean train?" in refused(capsys, "trian")
    assert "did you mean scaling?" in refused(capsys, "scal")
    assert "known: " in refused(capsys, "xyzzy")
    assert "did you mean SphereFace" in refused(capsys, "objectives", "spherefaces3")


def test_of_a_verb_it_is_the_verbs_help(capsys: pytest.CaptureFixture[str]):
    assert "Usage: pfc pack folder" in told(capsys, "pack", "folder")


def test_a_terminal_gets_it_set_and_paged(tmp_path: Path):
    (tmp_path / "pager").write_text("#!/bin/sh\ncat > paged\n")
    (tmp_path / "pager").chmod(0o755)
    here, there = pty.openpty()
    environment = os.environ | {"PAGER": str(tmp_path / "pager"), "TERM": "xterm"}
    command = [sys.executable, "-m", "pfc", "help", "objectives", "cosface"]
    subprocess.run(command, stdin=there, stdout=there, env=environment, cwd=tmp_path, timeout=60, check=True)
    os.close(there)
    os.close(here)
    paged = (tmp_path / "paged").read_text(encoding="utf-8")
    assert "CosFace" in paged
    assert "\x1b[" in paged
    assert "###" not in paged


# Completion


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two runs, and files."""
    for run in ("runs/faces", "runs/people", "other/glyphs"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.yaml").touch()
    (tmp_path / "photos.yaml").touch()
    return tmp_path


def completed(line: str, place: Path) -> list[str]:
    """What bash offers after ``line``, by the script that ``pfc --show-completion`` prints."""
    script = f"""
        source <({BIN}/pfc --show-completion)
        COMP_WORDS=({line}{" ''" if line.endswith(" ") else ""}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
        $(complete -p pfc | sed 's/.*-F \\([^ ]*\\).*/\\1/') {BIN}/pfc
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run(["bash", "-c", script], cwd=place, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pfc ev", ["evaluate"]),
        ("pfc train x.yaml --np", ["--nproc"]),
        ("pfc evaluate ru", ["runs/faces", "runs/people"]),
        ("pfc watch other/", ["other/glyphs"]),
        ("pfc help obj", ["objectives"]),
        ("pfc new recipe market", ["market1501"]),
        ("pfc train ph", []),  # bash's own: files
    ],
)
def test_bash_completes(line: str, offered: list[str], place: Path):
    assert completed(line, place) == offered


def test_zsh_is_offered_the_same_with_their_help(place: Path):
    environment = os.environ | {"_PFC_COMPLETE": "complete_zsh", "_TYPER_COMPLETE_ARGS": "pfc ev"}
    done = subprocess.run([BIN / "pfc"], cwd=place, env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith('_arguments \'*: :(("evaluate":"Measure a trained backbone')


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh here")
def test_the_script_is_installed(tmp_path: Path):
    environment = os.environ | {"HOME": str(tmp_path)}
    command = ["bash", "-c", f"{BIN}/pfc --install-completion; true"]
    subprocess.run(command, env=environment, capture_output=True, timeout=60, check=True)
    assert "bash_completions/pfc.sh" in (tmp_path / ".bashrc").read_text()
    assert "_pfc_completion" in (tmp_path / ".bash_completions" / "pfc.sh").read_text()


def test_zsh_takes_the_script(place: Path):
    shell = f'compdef() {{ print -r -- "$*" }}; eval "$({BIN}/pfc --show-completion)"; which _pfc_completion'
    done = subprocess.run(["zsh", "-fc", shell], cwd=place, capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("_pfc_completion pfc\n")
