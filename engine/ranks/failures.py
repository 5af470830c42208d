"""What the ranks tell each other when one of them fails, so that the one that failed first has the last word.

When a rank ends, the others fail on a connection that closes. Which of these errors a launcher sees first is chance;
so a failing rank says so in the store before it ends, and the others wait a moment and stand back.
"""

import json
import os
import socket
import sys
import time
import traceback

import torch.distributed as dist

from ...data.errors import UsageError

STAND_BACK = 2.0
"""Seconds by which a rank that failed because of another ends later: launchers compare whole seconds."""
_KEY = "first failure"


class PeerFailed(Exception):
    """This rank could not go on, because another failed before it.

    Attributes:
        wrong_use: whether that was a UsageError.
    """

    def __init__(self, message: str, *, wrong_use: bool) -> None:
        super().__init__(message)
        self.wrong_use = wrong_use


def blame(error: Exception, store: dist.Store, rank: int) -> Exception:
    """The exception to end this rank with: its own, or ``PeerFailed`` where another rank failed first.

    Args:
        error: what this rank failed with.
        store: shared by the ranks.
        rank: this one.
    """
    trace = "".join(traceback.format_exception(error))
    report = {"rank": rank, "host": socket.gethostname(), "wrong_use": isinstance(error, UsageError), "trace": trace}
    try:
        if _lost_a_peer(error):
            time.sleep(STAND_BACK)
            if not store.check([_KEY]):  # a rank that was killed says nothing
                return error
            first = json.loads(store.get(_KEY))
        else:
            first = json.loads(store.compare_set(_KEY, "", json.dumps(report)))
            if first["rank"] == rank:
                if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                    time.sleep(STAND_BACK / 2)  # the store is in this process: the others have yet to ask it
                return error
            time.sleep(STAND_BACK)
    except RuntimeError:  # the store is gone with its host
        return error
    text = f"rank {first['rank']} ({first['host']}) failed first:\n{first['trace'].rstrip()}"
    return PeerFailed(text, wrong_use=first["wrong_use"])


def record(message: str, trace: str) -> None:
    """Leaves an error where the launcher looks for it (torchrun's error file); on stderr where there is none.

    Args:
        message: ``Type: text``.
        trace: what is shown, the message at its end.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path is None:
        print(trace, file=sys.stderr, flush=True)
        return
    extra = {"py_callstack": trace, "timestamp": str(int(time.time()))}
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"message": {"message": message, "extraInfo": extra}}, file)


def _lost_a_peer(error: Exception) -> bool:
    """Whether the error is that of a connection which another rank's end has closed."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower())
