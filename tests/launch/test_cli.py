"""The command line's manners: help, version, and one clear line for wrong use."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from pfc.launch import cli
from pfc.launch.cli import main
from pfc.launch.verbs import bench, pack


def people(root: Path, identities: int = 2, images: int = 3) -> Path:
    for identity in range(identities):
        (root / f"person{identity}").mkdir(parents=True)
        for image in range(images):
            Image.new("RGB", (20, 20), (identity * 90, image * 60, 30)).save(root / f"person{identity}/{image}.png")
    return root


def assert_wrong_use(capsys: pytest.CaptureFixture[str], arguments: list[str], *told: str) -> None:
    """Exit code 2 and one line that says it; parsing errors may add where to find help."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    first, *rest = captured.err.splitlines()
    assert first.startswith("pfc: ")
    assert all(word in first for word in told), first
    assert rest in ([], ["Try 'pfc --help'."]) or (len(rest) == 1 and rest[0].startswith("Try 'pfc "))
    assert captured.out == ""


def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, *_: object, **__: object) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir", refuse)  # root, who runs tests in containers, may read everything
    assert_wrong_use(capsys, ["inspect", str(tmp_path / "set")], f"{tmp_path}/set: Permission denied")


def test_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == "pfc 0.1.0\n"


@pytest.mark.parametrize("verb", ["", "train", "pack", "pack folder", "pack glyphs", "pack pairs", "inspect", "export"])
def test_help_teaches(capsys: pytest.CaptureFixture[str], verb: str):
    assert main([*verb.split(), "--help"]) == 0
    assert "Usage: pfc" in capsys.readouterr().out


def test_alone_it_shows_its_verbs(capsys: pytest.CaptureFixture[str]):
    """Each with a whole sentence."""
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {verb} " in out for verb in cli.verbs())
    assert "...\n" not in out.split("\n", 1)[1]
    assert main(["pack"]) == 2
    captured = capsys.readouterr()
    assert ("Usage: pfc pack" in captured.out, captured.err) == (True, "")


def test_help_and_version_do_not_pay_for_libraries():
    heavy = (
        "torch",
        "numpy",
        "pydantic",
        "yaml",
        "nvidia",
        "PIL",
        "matplotlib",
        "sklearn",
        "wandb",
        "timm",
        "statistics",
    )
    code = f"""if True:
        import sys
        from pfc.launch.cli import main
        main(["--help"])
        assert "importlib.metadata" not in sys.modules
        main(["--version"])
        assert not [name for name in {heavy} if name in sys.modules]
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "trian"),
        (["train"], "CONFIG"),
        (["train", "c.yaml", "--nproc", "0"], "--nproc"),
        (["pack", "folder", "a", "b", "--quality", "300"], "--quality"),
        (["pack", "folder", "a", "b", "--size", "12x"], "12x"),
        (["pack", "synthetic", "b", "--identities", "3", "--size", "keep"], "keep"),
        (["evaluate", "run"], "--pairs"),
        (["inspect", "set", "--fast"], "--fast"),
    ],
)
def test_a_mistyped_line_is_told_in_one(capsys: pytest.CaptureFixture[str], arguments: list[str], told: str):
    assert_wrong_use(capsys, arguments, told)


def test_missing_files_are_told_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lost = str(tmp_path / "lost")
    out = str(tmp_path / "out")
    for arguments in (
        ["train", lost],
        ["pack", "folder", lost, out],
        ["pack", "pairs", lost, out + ".bin"],
        ["pack", "pairs", str(tmp_path), out + ".bin", "--list", lost],
        ["inspect", lost],
        ["evaluate", lost, "--pairs", lost],
        ["embed", lost, lost, out + ".npz"],
        ["export", lost, out + ".onnx"],
    ):
        assert_wrong_use(capsys, arguments, "lost")
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_packed(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_wrong_use(capsys, ["pack", "folder", str(empty), str(tmp_path / "out")], str(empty))
    source = people(tmp_path / "people")
    (source / "nobody").mkdir()
    assert_wrong_use(capsys, ["pack", "folder", str(source), str(tmp_path / "out")], "nobody")
    assert not (tmp_path / "out").exists()


def test_an_unreadable_image_is_counted_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = people(tmp_path / "people")
    (source / "person1" / "broken.jpg").write_bytes(b"not an image")
    assert main(["pack", "folder", str(source), str(tmp_path / "set"), "--size", "16", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "6 images of 2 identities" in out
    assert "skipped 1" in out
    assert "broken.jpg" in out


def test_packing_does_not_overwrite(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, out = people(tmp_path / "people"), tmp_path / "set"
    line = ["pack", "folder", str(source), str(out), "--size", "24x16", "--encoding", "png", "--workers", "1"]
    assert main(line) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    capsys.readouterr()
    assert_wrong_use(capsys, line, str(out))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert main([*line, "--overwrite"]) == 0


def test_inspect_counts_as_json(folder: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["inspect", str(folder / "set"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["images"], report["identities"], report["shards"]) == (24, 6, 1)
    assert (report["skipped"], report["errors"]) == (0, [])


def test_inspect_exits_with_1_on_damage(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for path in (folder / "set").iterdir():
        (damaged / path.name).write_bytes(path.read_bytes())
    (rec,) = damaged.glob("*.rec")
    content = bytearray(rec.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 200] = bytes(200)
    rec.write_bytes(content)
    assert main(["inspect", str(damaged)]) == 1
    out = capsys.readouterr().out
    assert "damaged" in out
    assert rec.name in out


def test_an_index_of_another_file_is_refused(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for path in (folder / "set").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (idx,) = tmp_path.glob("*.idx")
    idx.write_text("".join(f"{key}\t{offset * 1000 + 4}\n" for key, offset in enumerate(range(24))), encoding="utf-8")
    assert_wrong_use(capsys, ["inspect", str(tmp_path)], idx.name)


def test_pairs_from_a_packed_set_and_from_a_list(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "drawn.bin"
    assert main(["pack", "pairs", str(folder / "set"), str(out), "--pairs", "8"]) == 0
    assert "8 pairs, 4 of them matching" in capsys.readouterr().out
    assert_wrong_use(capsys, ["pack", "pairs", str(folder / "set"), str(out), "--pairs", "8"], str(out))

    source = people(tmp_path / "people")
    (tmp_path / "list.txt").write_text("person0/0.png person0/1.png 1\nperson0/0.png person1/0.png 0\n")
    line = ["pack", "pairs", str(source), str(tmp_path / "listed.bin"), "--list", str(tmp_path / "list.txt")]
    assert main(line) == 0
    assert "2 pairs, 1 of them matching" in capsys.readouterr().out


def test_an_unexpected_error_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("pfc.data.checking.inspect.inspect_dataset", fail)
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(tmp_path)])


def test_an_interrupt_is_quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pfc.data.checking.inspect.inspect_dataset", interrupt)
    assert main(["inspect", str(tmp_path)]) == 130
    assert capsys.readouterr().err == ""


def test_every_verb_is_registered_once():
    for app in (cli.app, bench.app, pack.app):
        names = [command.name or command.callback.__name__ for command in app.registered_commands if command.callback]
        assert len(names) == len(set(names))
