"""One rank of a training run, as torchrun starts it (``pfc train`` has ranks of its own).

    torchrun --nproc-per-node 2 -m pfc.launch.train configs/glyphs.yaml [key.sub=value ...] [--resume auto|never|PATH]

Exit codes: 0 done, 2 wrong use (one clear line), 143 stopped by SIGTERM and 75 by SIGUSR1 after saving, 1 anything
else. torchrun itself ends with 1 whatever its ranks' code was.
"""

import argparse
import os
import time
from functools import partial

from ..data.errors import UsageError
from .rank import leave, preload, run_rank

FIRST_RANK_GRACE = 30.0
"""Seconds that the first rank of a machine has to tell what is wrong with the configuration."""


def main() -> int:
    """The exit code of this process's rank."""
    arguments = _parse_arguments()
    return run_rank(partial(_train, arguments), told=True)


def _train(arguments: argparse.Namespace) -> int:
    from ..engine.config import load_config
    from ..engine.ranks.failures import PeerFailed

    try:
        config = load_config(arguments.config, arguments.overrides)
    except UsageError as error:
        if os.environ.get("LOCAL_RANK", "0") != "0":
            # The first rank of this machine has read the same file, and tells it; its end is this rank's too.
            time.sleep(FIRST_RANK_GRACE)
            raise PeerFailed(str(error), wrong_use=True) from None
        raise
    preload("pfc.engine.trainer")
    from ..engine.trainer import train

    return train(config, arguments.resume)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pfc.launch.train", description="One rank of a training run.")
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    parser.add_argument("overrides", metavar="key.sub=value", nargs="*", help="values that replace the file's")
    parser.add_argument("--resume", default="auto", metavar="auto|never|PATH", help="where to go on (default: auto)")
    return parser.parse_intermixed_args()  # values may stand after an option


if __name__ == "__main__":
    leave(main())
