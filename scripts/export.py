"""Export from a file: ``python scripts/export.py MODEL -o DIR --format onnx ...``.

The same as ``stance export MODEL -o DIR --format onnx ...``.
"""

import sys

from stance.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
