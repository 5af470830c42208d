"""The head's benchmark where nothing but torch is installed: ``python -m pfc.benchmarks.head --classes 1000000 ...``.

The options are those of ``pfc bench head``; those with several values take them one after the other.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from ...data.errors import UsageError
from .grid import HeadGrid, measure_grid
from .table import report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m pfc.benchmarks.head", description="Time whole steps of the head.")
    for field in dataclasses.fields(HeadGrid):
        several = isinstance(field.default, tuple)
        if isinstance(field.default, bool):
            parser.add_argument(f"--{field.name}", default=field.default, action=argparse.BooleanOptionalAction)
        else:
            sample = (field.default or (1,))[0] if isinstance(field.default, tuple) else field.default
            parser.add_argument(
                f"--{field.name}", type=type(sample), nargs="+" if several else None, default=field.default
            )
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = vars(parser.parse_args())
    file = options.pop("json")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    grid = HeadGrid(**values)
    try:
        results = measure_grid(grid, lambda done, total, what: print(f"{done}/{total} {what}", file=sys.stderr))
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2
    print(*report(results), *(line.error for line in results.lines if line.error), sep="\n")
    if file is not None:
        Path(file).write_text(json.dumps(results.to_dict(), indent=2), encoding="utf-8")
    return int(any(line.died for line in results.lines))


if __name__ == "__main__":
    sys.exit(main())
