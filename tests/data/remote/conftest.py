"""One packed data set, on a web server and in an S3 store."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pfc.data import pack_synthetic
from tests.data.remote.servers import WebServer, s3_server


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2,000 images of 50 identities in three shards, 13 MB in all."""
    path = tmp_path_factory.mktemp("packed") / "faces"
    pack_synthetic(path, identities=50, images_per_identity=40, size=112, shards=3, workers=1)
    return path


@pytest.fixture
def web(packed: Path, tmp_path: Path) -> Iterator[WebServer]:
    """Serves a copy of it at /faces."""
    shutil.copytree(packed, tmp_path / "web" / "faces")
    server = WebServer(tmp_path / "web")
    yield server
    server.close()


@pytest.fixture(scope="session")
def s3(packed: Path) -> Iterator[str]:
    """The address of an S3 store with the data set in s3://bucket/faces."""
    import boto3

    with s3_server() as url:
        client = boto3.client(
            "s3", endpoint_url=url, region_name="us-east-1", aws_access_key_id="key", aws_secret_access_key="secret"
        )
        client.create_bucket(Bucket="bucket")
        for path in sorted(packed.iterdir()):
            client.upload_file(str(path), "bucket", f"faces/{path.name}")
        yield url


@pytest.fixture
def at_s3(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """This process, and those that it starts, find the store."""
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": s3,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return s3
