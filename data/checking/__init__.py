"""Whether a data set is whole: ``inspect`` walks every record, ``repair`` writes what is good as a new set,
``rebuild`` rebuilds a lost index, ``merged_index`` writes one index over all shards."""
