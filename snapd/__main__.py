"""Lets `python -m snapd` stand for the `snapd` command.

Owns nothing else: the command line lives in snapd.cli.
"""

import sys

from snapd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
