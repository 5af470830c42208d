"""The head's GPU path on one card: ``run`` what the parts share, ``sweep`` tile sizes, ``speed`` whole steps."""
