"""Data sets that any machine can make: ``glyphs`` prints characters in ``fonts`` and photographs them (``drawing``);
``synthetic`` draws coloured patterns for tests and benchmarks."""
