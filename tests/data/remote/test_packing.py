"""Packing what lies on servers: folders of images in a bucket, tar files in WebDataset's format."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import boto3
import pytest

from pfc.data import UsageError, pack_folder, pack_webdataset
from pfc.data.packing import run as pack_run
from pfc.data.remote import store as remote_store
from tests.commands import pfc
from tests.data.packing.packed import contents, jpeg
from tests.data.remote.servers import WebServer


def upload(endpoint: str, prefix: str, files: dict[str, bytes]) -> None:
    client = boto3.client(
        "s3", endpoint_url=endpoint, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
    )
    for name, content in files.items():
        client.put_object(Bucket="bucket", Key=f"{prefix}/{name}", Body=content)


PHOTOS = {
    "anna/1.jpg": jpeg(1),
    "anna/2019/2.JPEG": jpeg(2),
    "anna/z.jpg": jpeg(3),
    "anna/notes.txt": b"text",
    "bob/1.png": b"no image at all",
    "bob/2.jpg": jpeg(5),
    ".hidden/1.jpg": jpeg(6),
    "readme": b"",
}


def test_a_bucket_packs_as_a_folder_does(at_s3: str, tmp_path: Path) -> None:
    upload(at_s3, "photos", PHOTOS)
    for name, content in PHOTOS.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(content)
    local = pack_folder(tmp_path / "photos", tmp_path / "local", size=8, workers=1)
    remote = pack_folder("s3://bucket/photos", tmp_path / "remote", size=8, workers=1)
    for name in ("train.rec", "train.idx", "labels.json", "skipped.tsv"):
        assert (tmp_path / "remote" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert remote.skipped == local.skipped
    assert len(remote.skipped) == 1
    about = json.loads((tmp_path / "remote" / "dataset.json").read_text())
    assert about["source"] == "folder s3://bucket/photos"


def test_the_command_packs_a_bucket_with_several_processes(at_s3: str, tmp_path: Path) -> None:
    upload(at_s3, "more", {f"{number % 3}/{number}.jpg": jpeg(number) for number in range(12)})
    done = pfc("pack", "folder", "s3://bucket/more", tmp_path / "out", "--size", "8", "--workers", "2")
    assert done.exit_code == 0, done.output
    assert contents(tmp_path / "out") == {(str(number % 3), jpeg(number)): 1 for number in range(12)}
    done = pfc("pack", "folder", "s3://bucket/nothing", tmp_path / "other", "--size", "8")
    assert done.exit_code == 2
    assert "s3://bucket/nothing" in done.last


def test_a_bucket_that_fails_meanwhile_is_gone_on_with(
    at_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(at_s3, "third", {f"{number % 2}/{number}.jpg": jpeg(number) for number in range(10)})
    monkeypatch.setattr(pack_run, "SAVE_EVERY", 0.0)
    read, left = remote_store.Store.read, 6

    def failing(self: remote_store.Store, *given: Any) -> bytes:
        nonlocal left
        left -= 1
        if left < 0:
            raise remote_store.RemoteError("s3://bucket/third cannot be read, in 5 attempts: no answer in time")
        return read(self, *given)

    monkeypatch.setattr(remote_store.Store, "read", failing)
    with pytest.raises(UsageError, match=r"no answer in time.*goes on where it stopped"):
        pack_folder("s3://bucket/third", tmp_path / "out", size=8, workers=1)
    monkeypatch.setattr(remote_store.Store, "read", read)
    assert pack_folder("s3://bucket/third", tmp_path / "out", size=8, workers=1).resumed_at == 6
    assert sum(contents(tmp_path / "out").values()) == 10


def tar(path: Path, files: list[tuple[str, bytes]], mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as file:
        for name, content in files:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            file.addfile(about, io.BytesIO(content))
    return path


def test_tar_files_of_webdataset(tmp_path: Path) -> None:
    first = tar(tmp_path / "a-000.tar", [("0.jpg", jpeg(0)), ("0.cls", b"7\n"), ("1.cls", b"3"), ("1.jpg", jpeg(1))])
    second = tar(
        tmp_path / "a-001.tar",
        [
            ("x/2.image.png", jpeg(2, kind="PNG")),
            ("x/2.json", b"{}"),
            ("x/2.cls", b"7"),
            ("3.jpg", jpeg(3)),  # no identity
            ("4.cls", b"5"),  # no image
            ("5.jpg", b"damaged"),
            ("5.cls", b"3"),
        ],
    )
    summary = pack_webdataset([first, second], tmp_path / "out", keep_bytes=True, workers=1)
    assert contents(tmp_path / "out") == {("3", jpeg(1)): 1, ("7", jpeg(0)): 1, ("7", jpeg(2, kind="PNG")): 1}
    assert dict(summary.skipped) == {
        "a-001.tar/3": "it has no identity: no .cls beside it",
        "a-001.tar/5": "no image format starts like this",
    }
    shutil.rmtree(tmp_path / "out")
    pack_webdataset(str(tmp_path / "a-{000..001}.tar"), tmp_path / "out", keep_bytes=True, workers=1)
    assert sum(contents(tmp_path / "out").values()) == 3
    pack_webdataset(tmp_path, tmp_path.parent / f"{tmp_path.name}-folder", keep_bytes=True, workers=1)
    assert sum(contents(tmp_path.parent / f"{tmp_path.name}-folder").values()) == 3


@pytest.mark.parametrize(
    ("label", "names"),
    [("txt", ["anna", "bob"]), ("json:person.id", ["7", "9"]), ("folder", ["f", "g"]), ("json:name", ["é", "z"])],
)
def test_where_the_identity_is(label: str, names: list[str], tmp_path: Path) -> None:
    about = [{"person.id": 7, "name": "é"}, {"person.id": 9.0, "name": "z"}]
    files = [
        (f"{folder}/{number}.{ending}", content)
        for number, folder in enumerate(("f", "g"))
        for ending, content in (
            ("jpg", jpeg(number)),
            ("txt", (b"anna", b"bob")[number]),
            ("json", json.dumps(about[number]).encode()),
        )
    ]
    pack_webdataset(tar(tmp_path / "a.tar", files), tmp_path / "out", label=label, size=8, workers=1)
    assert {name for name, _ in contents(tmp_path / "out")} == set(names)


@pytest.mark.parametrize(
    ("files", "mode", "what"),
    [
        ([("1.jpg", jpeg(1))], "w", r"a.tar/1: it has no identity: no .cls beside it; say with --label"),
        ([("1.cls", b"1")], "w", r"no sample with an image"),
        ([("1.jpg", jpeg(1)), ("1.cls", b"1")], "w:gz", r"a.tar: no tar file that is whole and not compressed"),
    ],
)
def test_tar_files_that_cannot_be_packed(files: list, mode: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=what):
        pack_webdataset(tar(tmp_path / "a.tar", files, mode), tmp_path / "out", size=8, workers=1)
    assert not (tmp_path / "out").exists()


def test_a_tar_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    path = tar(
        tmp_path / "a.tar", [(f"{number}.{ending}", b"1" * 600) for number in range(9) for ending in ("jpg", "cls")]
    )
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UsageError, match=r"a.tar: no tar file that is whole"):
        pack_webdataset(path, tmp_path / "out", size=8, workers=1)


def test_remote_tar_files_are_copied_and_an_interrupted_copy_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_store, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote_store, "PIECE", 1024)
    files = [
        (f"{number}.{ending}", content)
        for number in range(9)
        for ending, content in (("jpg", jpeg(number)), ("cls", b"1"))
    ]
    tar(tmp_path / "web" / "a-0.tar", files[:8])
    tar(tmp_path / "web" / "a-1.tar", files[8:])
    web = WebServer(tmp_path / "web")
    web.trouble = lambda number, path: "refuse" if number > 6 else None
    source = f"{web.url}/a-{{0..1}}.tar"
    with pytest.raises(UsageError, match=r"a-\d.tar: 403"):
        pack_webdataset(source, tmp_path / "out", keep_bytes=True, workers=1)
    came = len(web.asked)
    web.trouble = lambda number, path: "cut" if number % 5 == 0 else None
    pack_webdataset(source, tmp_path / "out", keep_bytes=True, workers=1)
    assert sum(contents(tmp_path / "out").values()) == 9
    assert min(start for _, start, _ in web.asked[came:]) > 0, "what was copied before is not asked for again"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "web"]
    web.close()


def test_tar_files_of_one_size_stay_apart(tmp_path: Path) -> None:
    for number in range(4):
        tar(tmp_path / "web" / f"{number}.tar", [("a.jpg", jpeg(number)), ("a.cls", str(number).encode())])
    web = WebServer(tmp_path / "web")
    web.tags = False
    pack_webdataset(f"{web.url}/{{0..3}}.tar", tmp_path / "out", keep_bytes=True, workers=1)
    assert contents(tmp_path / "out") == {(str(number), jpeg(number)): 1 for number in range(4)}
    web.close()


def test_tar_files_are_not_kept_open(tmp_path: Path) -> None:
    for number in range(40):
        tar(tmp_path / "in" / f"{number:02}.tar", [("a.jpg", jpeg(number)), ("a.cls", b"1")])
    before = len(list(Path("/proc/self/fd").iterdir()))
    pack_webdataset(tmp_path / "in", tmp_path / "out", keep_bytes=True, workers=1)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before + 1


@pytest.mark.parametrize(
    ("label", "why"),
    [
        (b"", "it has no identity: its label is empty"),
        (b"a\nb", "it has no identity: its label is no number or name of one line"),
        (b"7" * 5000, "it has no identity: its label is no number or name of one line"),
        (b"\xff", "it has no identity: its label cannot be read"),
    ],
)
def test_labels_that_are_none(label: bytes, why: str, tmp_path: Path) -> None:
    files = [("./0.jpg", jpeg(0)), ("./0.CLS", b"\xef\xbb\xbf3"), ("1.jpg", jpeg(1)), ("1.cls", label)]
    summary = pack_webdataset(tar(tmp_path / "a.tar", files), tmp_path / "out", keep_bytes=True, workers=1)
    assert summary.skipped == [("a.tar/1", why)]
    assert contents(tmp_path / "out") == {("3", jpeg(0)): 1}


def test_an_image_that_is_gone_from_the_bucket_is_skipped(
    at_s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(at_s3, "gone", {"a/1.jpg": jpeg(1), "a/2.jpg": jpeg(2)})
    listed = remote_store.Store.walk
    monkeypatch.setattr(remote_store.Store, "walk", lambda self: [*listed(self), ("a/3.jpg", 9)])
    summary = pack_folder("s3://bucket/gone", tmp_path / "out", keep_bytes=True, workers=1)
    assert summary.skipped == [("a/3.jpg", "no such file")]
