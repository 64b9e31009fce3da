"""Labels statements with onnxruntime, tokenizers and numpy alone from an ONNX export; needs no stance.

    python scripts/check_onnxruntime.py exports/onnx onnx/model.onnx quotes.jsonl > labels.jsonl

DIR is what ``stance export MODEL -o DIR --format onnx`` made. Each line has a label and its calibrated
probability for every task, in the order of the input.
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

spec = importlib.util.spec_from_file_location(
    "template", Path(__file__).parent.parent / "src" / "stance" / "template.py"
)
template = importlib.util.module_from_spec(spec)
spec.loader.exec_module(template)  # it needs nothing but Python


def main(folder: str, graph: str, statements: str) -> None:
    meta = json.loads(Path(folder, "stance.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(Path(folder, "tokenizer.json")))
    tokenizer.no_padding()
    tokenizer.enable_truncation(meta["max_length"], strategy="longest_first")
    session = onnxruntime.InferenceSession(str(Path(folder, graph)), providers=["CPUExecutionProvider"])
    inputs = [node.name for node in session.get_inputs()]
    for line in Path(statements).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pair = template.segments(
            row.get("speaker") or "", row.get("context") or "", row["text"], mark_speaker=meta["mark_speaker"]
        )
        encoded = tokenizer.encode(*pair)
        every = {
            "input_ids": encoded.ids,
            "attention_mask": encoded.attention_mask,
            "token_type_ids": encoded.type_ids,
        }
        (logits,) = session.run(["logits"], {name: np.array([every[name]]) for name in inputs})
        print(json.dumps(labels(logits[0].astype(np.float64), meta)))


def labels(logits: np.ndarray, meta: dict) -> dict:
    """Return the label and its probability for every task, from the logits of all tasks in order."""
    found, start = {}, 0
    for task in meta["tasks"]:
        part = logits[start : (start := start + len(task["labels"]))]
        powers = np.exp((part - part.max()) / meta.get("temperatures", {}).get(task["name"], 1.0))
        found[task["name"]] = [task["labels"][int(part.argmax())], float(powers.max() / powers.sum())]
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
