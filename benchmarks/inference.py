"""How fast is ``stance predict``, file to file, against a plain pipeline and the machine's limit?

Run by hand on a quiet machine:  python benchmarks/inference.py runs/default [--rows 20000]

Statements are drawn from the corpus, 8 to 60 tokens, every tenth a repetition. Each backend is a
fresh process; its bare rate is that of the same backend on batches that are tokenised already.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from measures import encoder_operations, machine, peak_of, product_rate

ROOT = Path(__file__).resolve().parent.parent
RUNS = {
    "torch fp32": ["--backend", "torch", "--exact"],
    "torch": ["--backend", "torch"],
    "onnxruntime fp32": ["--backend", "onnxruntime", "--exact"],
    "onnxruntime": ["--backend", "onnxruntime"],
    "openvino fp32": ["--backend", "openvino", "--exact"],
    "openvino": ["--backend", "openvino"],
    "auto": [],
}
PIPELINE = """
import json, sys
from pathlib import Path
import stance.model
from stance.template import segments
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
pipe = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(sys.argv[1]),
                batch_size=32, device=-1, truncation=True, max_length=128)
rows = [json.loads(line) for line in Path(sys.argv[2]).open()]
mark = json.loads(Path(sys.argv[1], "stance.json").read_text()).get("mark_speaker") is True
pairs = (dict(zip(("text", "text_pair"), segments(r["speaker"], "", r["text"], mark_speaker=mark))) for r in rows)
with open(sys.argv[3], "w") as out:
    for row, label in zip(rows, pipe(list(pairs))):
        out.write(json.dumps({**row, **label}) + "\\n")
"""


def statements(model: Path, number: int) -> list[dict[str, Any]]:
    """Corpus statements of 8 to 60 tokens, alone and in pairs; a tenth repeats one of the last 1,000."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    tokenizer.no_truncation()
    rng = random.Random(0)
    rows = [
        json.loads(line) for p in sorted((ROOT / "data/annotations").glob("*.jsonl")) for line in p.open()
    ]
    found: list[dict[str, Any]] = []
    while len(found) < number:
        if found and rng.random() < 0.1:
            found.append({**rng.choice(found[-1000:]), "id": len(found)})
            continue
        text = " ".join(row["text"] for row in rng.sample(rows, rng.choice((1, 1, 2))))
        speaker = rng.choice(rows).get("speaker") or ""
        if 8 <= len(tokenizer.encode(speaker, text)) <= 60:
            found.append({"id": len(found), "speaker": speaker, "text": text})
    return found


def timed(command: list[str]) -> tuple[float, float, str]:
    """Run a process; return its seconds, its peak memory in MB and the last line that it printed."""
    with tempfile.TemporaryFile("w+") as said:
        start, peak = time.perf_counter(), 0.0
        process = subprocess.Popen(command, stdout=said, stderr=said)
        while process.poll() is None:
            peak = max(peak, peak_of(process))
            time.sleep(0.02)
        seconds = time.perf_counter() - start
        said.seek(0)
        text = said.read().strip()
    if process.returncode:
        raise RuntimeError(text[-2000:])
    return seconds, peak, text.splitlines()[-1] if text else ""


def bare_rate(model: Path, options: list[str], rows: list[dict[str, Any]]) -> float:
    """Statements a second of the backend alone, on batches made before."""
    from stance import load

    exact = "--exact" in options
    backend = options[1] if "--backend" in options else "auto"
    classifier = load(model, backend=backend, exact=exact, rows=len(rows))
    triples = [(r["speaker"], "", r["text"]) for r in rows]
    parts = [classifier.prepare(triples[i : i + 2048]) for i in range(0, len(triples), 2048)]
    classifier.score(parts[0])
    start = time.perf_counter()
    for part in parts:
        classifier.score(part)
    return len(rows) / (time.perf_counter() - start)


def differences(path: Path, reference: Path) -> dict[str, float]:
    """Share of labels that differ and mean absolute difference of all probabilities."""
    flips, apart = [], []
    for a, b in zip(path.open(), reference.open(), strict=True):
        one, other = json.loads(a), json.loads(b)
        for name, value in other.items():
            if f"{name}_score" in other:
                flips.append(one[name] != value)
            elif isinstance(value, float) and not name.endswith(("_score", "lean")):
                apart.append(abs(one[name] - value))
    return {"flips": float(np.mean(flips)), "difference": float(np.mean(apart))}


def gemm_rates() -> dict[str, float]:
    """The processor's GFLOP/s in the encoder's largest product, in bf16 and int8."""
    import torch

    m, k, n = 4096, 384, 1536
    bf16 = (torch.matmul, torch.randn(m, k).bfloat16(), torch.randn(k, n).bfloat16())
    int8 = (torch._int_mm, torch.ones(m, k, dtype=torch.int8), torch.ones(k, n, dtype=torch.int8))
    return {name: product_rate(*each, "cpu") for name, each in (("bf16", bf16), ("int8", int8))}


def operations(model: Path, rows: list[dict[str, Any]]) -> float:
    """Operations of the encoder for the distinct statements' real tokens, without padding."""
    from stance.encoding import PairEncoder

    distinct = {(r["speaker"], "", r["text"]) for r in rows}
    mark = json.loads((model / "stance.json").read_text()).get("mark_speaker") is True
    encoder = PairEncoder(model, 128, mark_speaker=mark)
    lengths = encoder.encode(sorted(distinct)).lengths()
    return encoder_operations(json.loads((model / "config.json").read_text()), lengths)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--onnx", type=Path, help="the model's ONNX export, for the runs with onnxruntime")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--only", nargs="*", default=[*RUNS, "pipeline"], help="which to run")
    parser.add_argument("--bare", metavar="RUN", help="print the bare rate of one run and end")
    arguments = parser.parse_args()
    rows = statements(arguments.model, arguments.rows)
    if arguments.bare:
        print(bare_rate(arguments.model, RUNS[arguments.bare], rows))
        return
    report: dict[str, Any] = machine() | {"rows": len(rows), "runs": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source, reference = folder / "in.jsonl", folder / "torch fp32.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        for run, options in RUNS.items():
            if run not in arguments.only and run != "torch fp32":
                continue
            model = (arguments.onnx or arguments.model) if run.startswith("onnx") else arguments.model
            output = folder / f"{run}.jsonl"
            predict = [sys.executable, "-m", "stance", "predict", str(model), str(source), "--probabilities"]
            bare = [sys.executable, __file__, str(model), "--rows", str(len(rows)), "--bare", run]
            try:
                seconds, memory, said = timed([*predict, *options, "-o", str(output)])
                rate = float(timed(bare)[2])
            except RuntimeError as error:
                print(f"{run}: {str(error).strip().splitlines()[-1]}", file=sys.stderr)
                continue
            entry = {"rate": len(rows) / seconds, "bare_rate": rate, "memory_mb": memory, "said": said}
            report["runs"][run] = entry | differences(output, reference)
            print(run, report["runs"][run], file=sys.stderr)
        if "pipeline" in arguments.only:
            command = [sys.executable, "-c", PIPELINE, str(arguments.model), str(source)]
            seconds, memory, _ = timed([*command, str(folder / "pipeline.jsonl")])
            report["runs"]["pipeline"] = {"rate": len(rows) / seconds, "memory_mb": memory}
    needed = operations(arguments.model, rows)
    report["limits"] = {
        name: {"gflops": rate, "rate": len(rows) * rate * 1e9 / needed} for name, rate in gemm_rates().items()
    }
    columns = ("rate", "bare_rate", "memory_mb", "flips", "difference")
    print(f"{'':18}" + "".join(f"{c:>12}" for c in columns), file=sys.stderr)
    for name, entry in itertools.chain(report["runs"].items(), report["limits"].items()):
        cells = "".join(f"{entry[c]:>12.4g}" if c in entry else f"{'':>12}" for c in columns)
        print(f"{name:18}{cells}", file=sys.stderr)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
