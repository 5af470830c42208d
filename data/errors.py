"""The exceptions for errors that the user can fix."""

from pathlib import Path


class UsageError(Exception):
    """Wrong use: a missing file, a misspelt key, data that do not fit together.

    Its message is one line that says what is wrong and what to do. The command line prints that line, without a
    traceback, and exits with code 2.
    """


def forbidden(error: PermissionError) -> Exception:
    """What to raise in its place: a UsageError that names the file, or ``error`` itself where it is no file's."""
    if error.filename is None:
        return error
    return UsageError(f"{error.filename}: {error.strerror}: check who may read and write it")


class DamagedRecord(UsageError):
    """A record that cannot be read: damaged, or not what its place in the file promises.

    Whoever reads many records may catch it, count it and go on with the next record.

    Attributes: ``shard``, the ``.rec`` file; ``key`` of the record, None where unknown; ``offset`` in bytes;
    ``reason``, what is wrong with it.
    """

    def __init__(self, shard: Path, key: int | None, offset: int, reason: str) -> None:
        super().__init__(shard, key, offset, reason)  # as arguments, so that it can be sent between processes
        self.shard, self.key, self.offset, self.reason = shard, key, offset, reason

    def __str__(self) -> str:
        record = "record" if self.key is None else f"key {self.key}"
        return f"{self.shard}: {record} at byte {self.offset}: {self.reason}"


class UndecodableImage(UsageError, RuntimeError):
    """An encoded image that DALI cannot decode. Attributes: ``place`` among the images given; ``problem``."""

    def __init__(self, place: int, problem: str) -> None:
        super().__init__(place, problem)  # as arguments, so that it can be sent between processes
        self.place, self.problem = place, problem

    def __str__(self) -> str:
        return f"image {self.place} cannot be decoded: {self.problem}"
