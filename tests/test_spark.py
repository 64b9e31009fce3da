"""The recipe for Spark in docs/cluster.md runs as it stands there, in local mode."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pandas
import pytest

from conftest import ROOT, corpus_rows, write_jsonl
from stance import load

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("pyspark") is None, reason="pyspark is not installed"),
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark needs Java"),
]


def test_the_recipe_labels_as_the_model_does(trained, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/cluster.md").read_text(), flags=re.DOTALL)
    (tmp_path / "runs").mkdir()
    shutil.copytree(trained, tmp_path / "runs" / "default")
    quotes = [{k: row[k] for k in ("id", "speaker", "text")} for row in corpus_rows(60)]
    quotes[7]["speaker"] = None
    write_jsonl(tmp_path / "quotes.jsonl", [*quotes, {"id": "empty", "speaker": "", "text": " "}])
    settings = (
        "--master local[2] --conf spark.ui.enabled=false --conf spark.sql.shuffle.partitions=2 pyspark-shell"
    )
    environment = os.environ | {
        "PYSPARK_PYTHON": sys.executable,
        "PYSPARK_SUBMIT_ARGS": settings,
        "SPARK_LOCAL_IP": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = pandas.concat(pandas.read_parquet(p) for p in Path(tmp_path, "labelled").glob("*.parquet"))
    found = found.set_index("id").sort_index()
    expected = (
        load(trained, device="cpu").predict_table(pandas.DataFrame(quotes)).set_index("id").sort_index()
    )
    assert set(found.columns) == set(expected.columns)
    assert list(found.index) == list(expected.index)
    for name in expected.columns:
        if expected[name].dtype.kind == "f":
            assert found[name].to_list() == pytest.approx(expected[name].to_list(), abs=2e-6)
        elif name != "speaker":
            assert found[name].to_list() == expected[name].to_list()
