"""The summary that a pack verb prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..records.manifest import printable
from .sources.base import some

SKIPPED_NAME = "skipped.tsv"


@dataclass(frozen=True)
class PackSummary:
    """What a pack verb did; ``bytes`` of all ``.rec`` files, ``skipped`` images as (image, reason)."""

    path: Path
    images: int
    identities: int
    shards: int
    bytes: int
    skipped: list[tuple[str, str]] = field(default_factory=list)
    ignored_files: int = 0  # files in the source that are no images by their names
    empty_identities: Sequence[str] = ()  # all of their images were unreadable
    dropped_identities: int = 0  # left out as asked, and their images
    dropped_images: int = 0
    resumed_at: int = 0  # images of the source that an interrupted packing had done before

    def __str__(self) -> str:
        lines = [
            f"packed {self.images:,} images of {self.identities:,} identities into {self.shards} shard(s), "
            f"{self.bytes / 1e6:,.1f} MB: {self.path}"
        ]
        if self.resumed_at:
            lines.append(f"went on with an interrupted packing, which had done {self.resumed_at:,} images")
        if self.dropped_identities:
            lines.append(
                f"left out {self.dropped_identities:,} identities with {self.dropped_images:,} images, as asked"
            )
        if self.skipped:
            lines.append(f"skipped {len(self.skipped):,} unreadable image(s):")
            lines += [f"  {image}: {reason}" for image, reason in self.skipped[:10]]
            if len(self.skipped) > 10:
                lines.append(f"  and {len(self.skipped) - 10:,} more: {self.path / SKIPPED_NAME}")
        if self.empty_identities:
            lines.append(f"identities without a readable image: {some(self.empty_identities)}")
        if self.ignored_files:
            lines.append(f"ignored {self.ignored_files:,} file(s) that are no images by their names")
        return printable("\n".join(lines))
