"""``python -m adaround_ext``: the command line."""

from __future__ import annotations

import sys

from adaround_ext.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
