"""Train from a file, without the console script: ``python scripts/train.py CONFIG ...``.

The same as ``stance train CONFIG ...``.
"""

import sys

from stance.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
