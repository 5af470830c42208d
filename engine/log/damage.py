"""Damaged images that training met: counted over all ranks, each named once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...data import DamagedRecord, Loader

NAME = "damaged.tsv"
_SHOWN = 20  # records named on the console; all of them are in the file


class DamageTally:
    """What all ranks have met so far.

    Args:
        run_dir: the run's directory; ``damaged.tsv`` in it names each record once (shard, key, offset, reason).
        state: of the checkpoint that the run goes on from; {} for a new run.
        is_main: whether this rank writes.
        message: prints a line.
    """

    def __init__(self, run_dir: Path, state: dict[str, Any], is_main: bool, message: Callable[[str], None]) -> None:
        saved = state.get("damage", {})
        self.replaced: int = saved.get("replaced", 0)
        self._samples: set[int] = set(saved.get("samples", []))
        self._path = run_dir / NAME
        self._is_main = is_main
        self._message = message
        # A run that was cut short may have named more than its last checkpoint knows.
        self._named = (
            set(self._path.read_text(encoding="utf-8").splitlines()) if state and self._path.exists() else set()
        )
        if is_main and not state:
            self._path.unlink(missing_ok=True)

    @property
    def records(self) -> int:
        """How many different records were damaged."""
        return len(self._samples)

    def collect(self, loader: Loader) -> None:
        """Adds what the loaders of all ranks met since the last call. A collective."""
        replaced, met = loader.take_damage()
        total = torch.tensor(replaced)
        dist.all_reduce(total)
        if not total:
            return
        self.replaced += int(total)
        everyone: list[dict[int, DamagedRecord]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, met)
        new = {sample: record for met in everyone for sample, record in met.items() if sample not in self._samples}
        self._samples.update(new)
        if self._is_main:
            self._name(list(new.values()))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"damage": {"replaced": self.replaced, "samples": sorted(self._samples)}}

    def metrics(self) -> dict[str, int]:
        """For metrics.jsonl."""
        return {"damaged_records": self.records, "damaged_replaced": self.replaced}

    def _name(self, records: list[DamagedRecord]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            for record in records:
                line = f"{record.shard}\t{record.key}\t{record.offset}\t{record.reason}"
                if line in self._named:
                    continue
                self._named.add(line)
                file.write(line + "\n")
                if len(self._named) <= _SHOWN:
                    self._message(f"damaged    {record}; another image takes its place")
                elif len(self._named) == _SHOWN + 1:
                    self._message(f"damaged    further ones are named in {self._path}")
