"""The tests; where pfc is not installed, those that need torch alone find it in this checkout."""

import importlib.util
import sys
import types
from pathlib import Path

if importlib.util.find_spec("pfc") is None:
    package = types.ModuleType("pfc")  # as setup.py would install it
    package.__path__ = [str(Path(__file__).resolve().parent.parent)]
    sys.modules["pfc"] = package
