"""Verification sets: ``pairs`` makes, reads and writes them; ``plain_pickle`` reads the field's files without running
code."""
