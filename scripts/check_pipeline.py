"""Labels statements with plain transformers from a one-task export; needs no stance.

    python scripts/check_pipeline.py exports/dialogue quotes.jsonl > labels.jsonl

DIR is what ``stance export MODEL -o DIR --format transformers --task dialogue`` made. Each line has the
task's label and its probability, which is calibrated, in the order of the input.
"""

import importlib.util
import json
import sys
from pathlib import Path

from transformers import pipeline

spec = importlib.util.spec_from_file_location(
    "template", Path(__file__).parent.parent / "src" / "stance" / "template.py"
)
template = importlib.util.module_from_spec(spec)
spec.loader.exec_module(template)  # it needs nothing but Python


def main(folder: str, statements: str) -> None:
    meta = json.loads(Path(folder, "stance.json").read_text(encoding="utf-8"))
    (task,) = meta["tasks"]
    classify = pipeline("text-classification", folder)
    for line in Path(statements).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        first, second = template.segments(
            row.get("speaker") or "", row.get("context") or "", row["text"], mark_speaker=meta["mark_speaker"]
        )
        found = classify({"text": first, "text_pair": second}, truncation=True)
        print(json.dumps({task["name"]: [found["label"], found["score"]]}))


if __name__ == "__main__":
    main(*sys.argv[1:])
