"""One rank of a training run, as torchrun starts it (``pfc train`` starts it as well).

    torchrun --nproc-per-node 2 -m pfc.launch.train configs/glyphs.yaml [key.sub=value ...] [--resume auto|never|PATH]

Exit codes: 0 done, 2 wrong use (one clear line), 143 stopped by SIGTERM and 75 by SIGUSR1 after saving, 1 anything
else. torchrun itself ends with 1 whatever its ranks' code was.
"""

import argparse
import ctypes
import os
import signal
import sys
import time
import traceback

from ..data.errors import UsageError

PARENT = "PFC_PARENT"
"""Environment variable by which ``pfc train`` tells a rank its process id, and that it will show the rank's error."""


FIRST_RANK_GRACE = 30.0
"""Seconds that the first rank of a machine has to tell what is wrong with the configuration."""


def main() -> int:
    parent = os.environ.get(PARENT)
    if parent is not None:
        _die_with(int(parent))
    arguments = _parse_arguments()
    # torch is imported here, not above: a rank whose parent is gone should not get that far.
    from torch.distributed.elastic.multiprocessing.errors import record

    from ..engine.ranks.failures import PeerFailed

    try:
        # record() leaves the exception in the file that the starting process reads.
        return record(_train)(arguments) or 0
    except PeerFailed as error:  # what it says has been told by the other rank
        return 2 if error.wrong_use else 1
    except UsageError as error:
        if parent is None:
            print(f"pfc: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except Exception:
        if parent is None:
            traceback.print_exc()
        return 1


def _train(arguments: argparse.Namespace) -> int:
    from ..engine.config import load_config
    from ..engine.ranks.failures import PeerFailed
    from ..engine.trainer import train

    try:
        config = load_config(arguments.config, arguments.overrides)
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # The first rank of this machine has read the same file, and tells it; its end is this rank's too.
            time.sleep(FIRST_RANK_GRACE)
            raise PeerFailed(str(error), wrong_use=True) from None
        raise
    try:
        return train(config, arguments.resume)
    except UsageError as error:
        # Of that very type, also where it was a special kind: the starting process knows it by its name.
        raise UsageError(str(error)) from None
    except PermissionError as error:
        raise UsageError(f"{error.filename}: {error.strerror}: check who may read and write it") from None


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pfc.launch.train", description="One rank of a training run.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help="values that replace the file's")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="where to go on (default: auto)")
    return parser.parse_intermixed_args()  # values may stand after an option


def _die_with(parent: int) -> None:
    """The kernel kills this rank when its parent dies in a way that leaves it no time to stop its ranks."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG of <sys/prctl.h>
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        sys.exit(1)


if __name__ == "__main__":
    exit_code = main()
    if exit_code in (1, 2):
        # Threads of the process group, which an error leaves standing, would abort or hold up an orderly end.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
