"""Measurements of speed, each compared with a baseline in the same run and with the floor that this machine allows.

``head/`` times the head and needs torch alone (``python -m pfc.benchmarks.head --help``), ``gpu/`` its GPU path on
one card (``python benchmarks/gpu --help``), ``scale/`` more and more classes until they no longer fit, ``step`` the
whole training step, ``data`` loading; ``accuracy`` is how well variants of a run learn. ``ceilings`` are the machine's,
``ranks`` runs a function on processes that are joined in a group.
"""
