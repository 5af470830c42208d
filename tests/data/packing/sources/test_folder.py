"""Packing folders: nested ones, odd names, links."""

import os
from pathlib import Path

import pytest

from pfc.data import RecordDataset, pack_folder
from tests.data.packing.packed import contents, jpeg, refusal


def write(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(jpeg(seed))


def test_nested_folders_odd_names_and_links(tmp_path: Path) -> None:
    src = tmp_path / "src"
    write(src / "anna" / "a b\tc\nd.jpg", 0)
    write(src / "anna" / "2019" / "May" / "x.JPEG", 1)
    write(src / "tab\tand\nline" / os.fsdecode(b"\xff.jpg"), 2)
    write(src / "-rf" / "ü.jpg", 3)
    write(src / ".hidden" / "x.jpg", 4)
    write(src / "anna" / ".hidden.jpg", 5)
    write(tmp_path / "elsewhere" / "deep" / "1.jpg", 6)
    (src / "linked").symlink_to(tmp_path / "elsewhere")
    (src / "anna" / "link.jpg").symlink_to(tmp_path / "elsewhere" / "deep" / "1.jpg")
    (src / "anna" / "folder").symlink_to(tmp_path / "elsewhere" / "deep")
    (src / "anna" / "2019" / "round").symlink_to(src / "anna")  # it would go on for ever
    (src / "anna" / "broken.jpg").symlink_to(tmp_path / "nothing")
    (src / "anna" / "notes.txt").touch()
    (src / "readme").touch()
    summary = pack_folder(src, tmp_path / "out", size=8, workers=1)
    assert contents(tmp_path / "out") == {
        ("anna", jpeg(0)): 1,
        ("anna", jpeg(1)): 1,
        ("tab\tand\nline", jpeg(2)): 1,
        ("-rf", jpeg(3)): 1,
        ("linked", jpeg(6)): 1,
        ("anna", jpeg(6)): 2,
    }
    assert summary.ignored_files == 2
    assert summary.skipped == [("anna/broken.jpg", "no such file or directory")]


def test_a_link_that_leads_round_is_not_followed(tmp_path: Path) -> None:
    src = tmp_path / "src"
    write(src / "anna" / "1.jpg", 0)
    (src / "itself").symlink_to("itself")
    (src / "anna" / "itself").symlink_to("itself")
    (src / "anna" / "above").symlink_to(src)
    (src / "round").symlink_to(src)
    assert "no image in the sub-folder(s) round" in refusal(pack_folder, src, tmp_path / "out")
    (src / "round").unlink()
    pack_folder(src, tmp_path / "out", size=8, workers=1)
    assert contents(tmp_path / "out") == {("anna", jpeg(0)): 1}


def test_a_file_named_like_an_image_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    write(tmp_path / "src" / "anna" / "1.jpg", 0)
    os.mkfifo(tmp_path / "src" / "anna" / "2.jpg")
    summary = pack_folder(tmp_path / "src", tmp_path / "out", size=8, workers=1)
    assert (summary.images, summary.skipped) == (1, [("anna/2.jpg", "it is empty")])


def test_few_images_and_none(tmp_path: Path) -> None:
    for i, name in enumerate(["anna", "anna", "anna", "bob", "bob"]):
        write(tmp_path / "src" / name / f"{i}.jpg", i)
    (tmp_path / "src" / "nobody").mkdir()
    assert "no image in the sub-folder(s) nobody" in refusal(pack_folder, tmp_path / "src", tmp_path / "out")
    summary = pack_folder(tmp_path / "src", tmp_path / "out", min_images=3, size=8, workers=1)
    assert (summary.images, summary.identities) == (3, 1)
    assert (summary.dropped_identities, summary.dropped_images) == (1, 2)
    assert RecordDataset.open(tmp_path / "out").identity_names() == ["anna"]
    assert "there is nothing to pack" in refusal(pack_folder, tmp_path / "src", tmp_path / "x", min_images=4)


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP"])
def test_files_can_be_kept_as_they_are(kind: str, tmp_path: Path) -> None:
    (tmp_path / "src" / "anna").mkdir(parents=True)
    (tmp_path / "src" / "anna" / f"1.{kind.lower()}").write_bytes(jpeg(1, kind=kind, width=20))
    (tmp_path / "src" / "anna" / f"2.{kind.lower()}").write_bytes(jpeg(1, kind=kind)[:-60])
    summary = pack_folder(tmp_path / "src", tmp_path / "out", keep_bytes=True, workers=1)
    assert contents(tmp_path / "out") == {("anna", jpeg(1, kind=kind, width=20)): 1}
    assert len(summary.skipped) == 1
    ds = RecordDataset.open(tmp_path / "out")
    assert ds.image_size is None
    assert ds.manifest is not None
    assert ds.manifest.creation == {"keep_bytes": True, "shards": 1, "seed": 0}
