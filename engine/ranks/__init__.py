"""The processes of a run: ``distributed`` joins them, ``failures`` tells all what went wrong in one, ``watchdog``
ends a run that stands still, ``stopping`` saves where a signal asks for the end."""
