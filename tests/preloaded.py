"""What every process forked for a test has imported; one list, since there is one process that they are forked from.

Much of it is otherwise imported in use, as scikit-learn is by an evaluation, and that by each process again. It stays
for good: the garbage collector never looks at it again, and so copies none of its pages into a fork.
"""

import gc
import importlib
from contextlib import suppress

MODULES = [
    *("torch.distributed", "torch._dynamo", "torch.utils.serialization"),
    *("pfc.partial_fc", "pfc.engine.trainer", "pfc.engine.report.figures", "pfc.launch.cli", "pfc.launch.train"),
    *("pfc.benchmarks.head.measure", "pfc.benchmarks.step"),
    *("pytest", "nvidia.dali.fn", "sklearn.metrics", "matplotlib.backends.backend_svg", "matplotlib.figure", "jinja2"),
]

gc.disable()  # while it grows there is no garbage in it
for name in MODULES:
    with suppress(ImportError):  # tests that need torch alone run where there is no more
        importlib.import_module(name)
gc.freeze()
gc.enable()
