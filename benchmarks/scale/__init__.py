"""``pfc bench scale``: ``sweep`` says what is measured, by ``head/``'s means; ``table`` and ``plot`` show it."""
