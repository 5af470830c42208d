"""How well a backbone tells identities apart: ``sets`` are a run's, ``evaluate`` computes embeddings on all ranks,
``metrics`` are the figures."""
