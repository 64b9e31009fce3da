"""Evaluate from a file: ``python scripts/evaluate.py MODEL FILES ...``.

The same as ``stance evaluate MODEL FILES ...``.
"""

import sys

from stance.cli import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
