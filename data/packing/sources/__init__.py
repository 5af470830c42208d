"""What can be packed: one module for each kind of source, all of them a ``Source``."""
