"""RecordIO shards as they lie on the disk, read only.

``recordio`` frames records, ``index`` knows where each is, ``labels`` how one stores its class. ``dataset`` is a data
set of shards with its ``manifest`` (dataset.json), ``joint`` several as one. ``all_labels`` reads all labels at once,
mostly from ``plain_records``; ``cache`` keeps such arrays for all processes of a machine, ``mapped`` maps files into
memory.
"""
