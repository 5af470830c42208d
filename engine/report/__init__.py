"""report.html: ``write`` gathers a run's ``record`` and fills the ``page`` with ``figures`` and ``pictures``."""
