"""``pfc convert``: ``convert`` makes a run of pfc from the common implementation's files, by way of ``backbone`` and
``optimizer``."""
