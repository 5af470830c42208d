"""``python -m pfc``: the command line, where its script is not on the PATH. Installed as ``pfc/__main__.py``."""

import sys

from pfc.launch.cli import main  # pyright: ignore[reportMissingImports]

sys.exit(main())
