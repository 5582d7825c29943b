"""Runs the `findrec` command as `python -m findrec.cli`."""

import sys

from findrec.cli.app import main

sys.exit(main())
