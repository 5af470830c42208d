"""The one exception for what the person at the keyboard can mend."""


class UsageError(Exception):
    """Wrong use: a missing file, a misspelt key, data that do not fit together.

    Its message is one line that says what is wrong and what to do. The command line prints that line, without a
    traceback, and exits with code 2.
    """
