"""The small data set and run of the command line's tests."""

from tests.launch.conftest import folder as folder
