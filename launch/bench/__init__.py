"""Measurements of speed, each beside a baseline in the same run and beside the floor that this machine allows.

The head's (``grid.py`` and what it imports) needs torch alone: ``python -m pfc.launch.bench --help``. That of the whole
training step (``step.py``) needs the rest of pfc. ``gpu_*.py`` are the parts of ``launch/bench_gpu.py``, for one card.
"""
