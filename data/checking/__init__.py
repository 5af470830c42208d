"""Whether a data set is whole: ``inspect`` walks every record, ``repair`` writes what is good as a new set,
``rebuild`` makes a lost index, ``merged_index`` one index for readers of several shards."""
