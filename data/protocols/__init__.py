"""Evaluation protocols: ``table`` reads and writes the one table that describes each of them, ``made`` makes it from a
packed set or a list of trials, ``published`` from published sets, ``images`` reads the images that it names."""
