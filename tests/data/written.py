"""Data sets of made-up bytes, as pfc, InsightFace and im2rec write them."""

from pathlib import Path

from pfc.data.packing.writer import ShardedWriter
from pfc.data.records.recordio import MAGIC_BYTES, RecordWriter, pack_image


def image(i: int) -> bytes:
    return bytes([i % 251]) * (5 + i % 7) + MAGIC_BYTES * (i % 3)


def write_packed(out: Path, labels: list[int], *, identities: int = 5, shards: int = 3) -> Path:
    with ShardedWriter(out, identities=identities, image_size=(4, 6), source="test", shards=shards) as writer:
        for i, label in enumerate(labels):
            writer.write(label, image(i))
    return out


def write_insightface(folder: Path, per_identity: list[int]) -> list[int]:
    """A header record, images from key 1 on, identity records; the labels of the images."""
    folder.mkdir()
    labels = [label for label, count in enumerate(per_identity) for _ in range(count)]
    images, identities = len(labels), len(per_identity)
    with RecordWriter(folder / "train.rec") as writer:
        writer.write(0, pack_image([float(images + 1), float(images + 1 + identities)], b""))
        for i, label in enumerate(labels):
            stored = float(label) if i % 2 else [float(label), 77.0]
            writer.write(1 + i, pack_image(stored, image(i)))
        first = 1
        for identity, count in enumerate(per_identity):
            writer.write(1 + images + identity, pack_image([float(first), float(first + count)], b""))
            first += count
    return labels


def write_im2rec(rec: Path, labels: list[float], *, keys: list[int] | None = None) -> None:
    with RecordWriter(rec) as writer:
        for i, label in enumerate(labels):
            writer.write(i if keys is None else keys[i], pack_image(label, image(i)))
