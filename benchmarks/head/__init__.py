"""``pfc bench head``: ``grid`` measures every ``case`` by ``measure``, in ``table`` and ``plot``.

The floor is from ``case``, what does not fit from ``memory``; ``heads`` builds pfc's, the peer's and the ``dense``
one; ``phases`` measures where a step's time goes.
"""
