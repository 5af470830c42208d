"""Times the head's GPU path on one card, with torch and Triton alone; pfc need not be installed.

From the root of the repository:

    python benchmarks/gpu --out "$OUT" [--peer DIR] [--classes 1000000] [--seconds 480]

In this order, each part skipped when the time is up: the card's ceilings; tiles and block sizes of the fused kernels,
of which the best are taken; whole steps of pfc, of pfc's plain path, of a dense head and, with ``--peer``, of the
common implementation's head; the kernels that a step is made of. A table on the screen, everything in ``gpu.json``.
Exit code 1 where a part failed. ``--device cpu`` runs all of it in small, the kernels interpreted. That the path is
right, ``make test-gpu`` shows.
"""

import argparse
import importlib
import os
import sys
import time
import traceback
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BEGIN = time.monotonic()


def main() -> None:
    options = _options()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    package = types.ModuleType("pfc")  # as setup.py would install it
    package.__path__ = [str(ROOT)]
    sys.modules["pfc"] = package

    setting, speed, sizes = (
        importlib.import_module(f"pfc.benchmarks.gpu.{name}") for name in ("run", "speed", "sweep")
    )
    run = setting.GpuRun(setting.Options(**vars(options)), BEGIN)
    for part in (speed.ceilings, sizes.sweep, speed.steps, speed.profile):
        if run.time_is_up:
            print(f"skipped, the time is up: {part.__name__}")
            continue
        try:
            part(run)
        except Exception:
            run.fail(f"{part.__name__}: {traceback.format_exc()}")
        print(f"-- {part.__name__}: {time.monotonic() - BEGIN:.0f} s so far", flush=True)
        run.write()
    speed.table(run)
    sys.exit(1 if run.results["failures"] else 0)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--classes", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0, 0.1])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--keep-gib", type=float, default=4.0, help="for the probabilities between forward and update")
    parser.add_argument("--peer", type=Path, help="folder of the common implementation's partial_fc_v2.py")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", ".")))
    parser.add_argument("--seconds", type=float, default=480.0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
