"""Evaluation protocols: ``table`` reads and writes the one table that describes each of them, ``made`` makes it from a
packed set and from the published lists, ``images`` reads the images that it names."""
