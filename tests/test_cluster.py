"""Many processes give what one gives, byte for byte, whichever of them are killed."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pyarrow
import pyarrow.parquet
import pytest

from conftest import corpus_rows, write_jsonl
from stance import Classifier, load
from stance.actors import Failed, PartLabeller, Work
from stance.cluster import Cluster, predict_on_cluster
from stance.errors import CheckpointError, DataError, UsageError
from stance.labelling import Chosen
from stance.layout import Layout
from stance.predicting import predict_files
from stance.request import Options
from stance.source import Source

ray = pytest.importorskip("ray")


@pytest.fixture(scope="module")
def model(trained: Path) -> Classifier:
    return load(trained, device="cpu", exact=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a Ray of two processors and a GPU that is none."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    ray.init(address="local", num_cpus=2, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def on_cluster(trained: Path, paths: list[Path], output: Path, **options: Any):
    """As the command with two actors, in this process."""
    call = {name: options.pop(name) for name in ("resume", "log") if name in options}
    return predict_on_cluster(
        str(trained), [str(p) for p in paths], str(output), Options(**{"part_rows": 16, **options}),
        Cluster(num_actors=2), device="cpu", exact=True, **call,
    )  # fmt: skip


def alone(model: Classifier, paths: list[Path], output: Path, *, resume: bool = False, **options: Any):
    given = Options(**{"part_rows": 16, **options})
    return predict_files(model, [str(p) for p in paths], str(output), given, resume=resume)


def same_bytes(one: Path, other: Path) -> None:
    """Output, metadata and rejects are the same."""
    for suffix in ("", ".meta.json", ".rejects.jsonl"):
        first, second = (path.with_name(path.name + suffix) for path in (one, other))
        assert first.exists() == second.exists()
        assert not first.exists() or first.read_bytes() == second.read_bytes(), suffix


# --- equal ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parquet_folders_are_labelled_as_by_one_process(cluster, model, trained, tmp_path):
    paths = []
    for i, (number, group) in enumerate([(50, 7), (30, 1000), (60, 20)]):
        rows = corpus_rows(number, seed=i)
        table = pyarrow.table(
            {
                "text": [r["text"] for r in rows],
                "speaker": pyarrow.array([r["speaker"] for r in rows]).dictionary_encode(),
                "small": pyarrow.array([k % 100 for k in range(number)], pyarrow.int8()),
                "nested": [{"a": [k]} for k in range(number)],
            }
        )
        paths.append(tmp_path / f"{i}.parquet")
        pyarrow.parquet.write_table(table, paths[-1], row_group_size=group)
    alone(model, paths, tmp_path / "one.parquet", probabilities=True, shard=(2, 2))
    summary = on_cluster(trained, paths, tmp_path / "many.parquet", probabilities=True, shard=(2, 2))
    assert summary.backend == "torch fp32 on cpu, by Ray"
    same_bytes(tmp_path / "one.parquet", tmp_path / "many.parquet")


@pytest.mark.slow
def test_the_first_bad_row_is_told_and_either_engine_goes_on(cluster, model, trained, tmp_path):
    rows = [{"text": f"war {i}" if i not in (70, 99, 150) else ""} for i in range(200)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    with pytest.raises(DataError, match=r"in\.jsonl:71: text must be text that is not empty"):
        on_cluster(trained, [source], tmp_path / "many.csv")
    alone(model, [source], tmp_path / "one.csv", on_error="skip")
    assert alone(model, [source], tmp_path / "many.csv", on_error="skip", resume=True).resumed >= 4 * 16
    same_bytes(tmp_path / "one.csv", tmp_path / "many.csv")
    lines: list[str] = []
    again = on_cluster(
        trained, [source], tmp_path / "many.csv", on_error="skip", resume=True, log=lines.append
    )
    assert again.finished


# --- killed --------------------------------------------------------------------------------------


def folder_of_files(folder: Path) -> Path:
    """42,000 rows in three formats, some of them bad: 21 parts."""
    folder.mkdir()
    bad = [b"{broken", b'{"text": ""}', b'{"text": "caf\xe9"}']
    good = (json.dumps({"text": f"we will meet on day {i}", "id": i}).encode() for i in itertools.count())
    lines = [bad[i // 997 % 3] if i % 997 == 5 else next(good) for i in range(20_000)]
    (folder / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    quoted = "".join(f'"war {i}\nagain, and",{i}\n' for i in range(12_000))
    (folder / "b.csv").write_text("text,id\n" + quoted)
    (folder / "c.csv.gz").write_bytes(
        gzip.compress(("id,text\n" + "".join(f"{i},stop {i}\n" for i in range(10_000))).encode())
    )
    return folder


def actors() -> set[int]:
    """The processes of this session's Ray that hold a model."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_actor = (path / "cmdline").read_bytes().startswith(b"ray::MapWorker")
            if is_actor and os.getpid() in ancestors(int(path.name)):
                found.add(int(path.name))
        except (OSError, ValueError, IndexError):
            continue
    return found


def ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


def until(process: subprocess.Popen, state: Path, rows: int) -> None:
    """Wait until a run has this many rows done."""
    while process.poll() is None:
        try:
            if json.loads(state.read_text())["progress"]["rows"] >= rows:
                return
        except (OSError, ValueError):
            pass
        time.sleep(0.02)
    raise AssertionError(f"ended before it was killed:\n{process.communicate()[1]}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the actors in /proc")
def test_a_killed_driver_and_a_killed_actor_lose_nothing(cluster, model, trained, tmp_path):
    """The command, killed with kill -9, goes on; then one of its two actors is."""
    folder = folder_of_files(tmp_path / "in")
    paths = sorted(folder.iterdir())
    alone(model, paths, tmp_path / "one.csv", on_error="null", part_rows=2048)
    output = tmp_path / "many.csv"
    command = [
        sys.executable, "-m", "stance", "predict", str(trained), str(folder), "-o", str(output), "--exact", "--backend",
        "torch", "--device", "cpu", "--on-error", "null", "--engine", "ray", "--num-actors", "2", "--address", cluster,
    ]  # fmt: skip
    state = tmp_path / ".many.csv.stance" / "state.json"
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    until(first, state, 1)
    first.kill()
    first.communicate()
    done = json.loads(state.read_text())["progress"]["rows"]
    assert 0 < done < 42_000
    before = actors()  # some may outlive the driver for a moment
    second = subprocess.Popen([*command, "--resume"], stderr=subprocess.PIPE, text=True)
    until(second, state, done + 1)
    os.kill((actors() - before).pop(), signal.SIGKILL)
    _, told = second.communicate()
    assert second.returncode == 0, told
    assert f"going on after {done} rows" in told
    assert "died or was killed" in told
    assert "Traceback" not in told
    assert told.splitlines()[-1].endswith("rows rejected (torch fp32 on cpu, by Ray)")
    same_bytes(tmp_path / "one.csv", output)


# --- workers -------------------------------------------------------------------------------------


@pytest.fixture
def work(model, trained, tmp_path) -> tuple[Work, Any]:
    """What an actor is told, and a batch of all blocks of a file."""
    rows = [{name: row[name] for name in ("id", "speaker", "text")} for row in corpus_rows(40)]
    source = write_jsonl(tmp_path / "in.jsonl", rows)
    options = Options(part_rows=16)
    chosen = Chosen.of(model, options)
    layout = Layout("out.csv", "csv", list(rows[0]), chosen.added, options)
    blocks = list(Source([str(source)], options, arrow=False).blocks())
    batch = pyarrow.table({"blocks": [pickle.dumps(blocks)]})
    return Work(chosen, layout, {str(source): source.stat().st_size}, str(tmp_path)), batch


def results(work: Work, batch: Any) -> list[Any]:
    here = Path.cwd()
    try:
        return [
            pickle.loads(t["part"][0].as_py()) for t in PartLabeller(pickle.loads(pickle.dumps(work)))(batch)
        ]
    finally:
        os.chdir(here)


def test_an_actor_labels_blocks(work):
    parts = results(*work)
    assert [(p.number, p.rows, p.labelled) for p in parts] == [(0, 16, 16), (1, 16, 16), (2, 8, 8)]


def test_an_actor_that_sees_another_model_says_so(work, trained, tmp_path):
    told, batch = work
    folder = Path(shutil.copytree(trained, tmp_path / "model"))
    (folder / "manifest.json").write_text((folder / "manifest.json").read_text() + "\n")
    chosen = Chosen(str(folder), told.chosen.manifest, told.chosen.candidate, "cpu", told.chosen.added)
    (failed,) = results(Work(chosen, told.layout, told.sizes, told.folder), batch)
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, UsageError)
    assert "is another model here - give all machines the same folder" in str(failed.error)


@pytest.mark.parametrize("gone", [True, False])
def test_an_actor_that_sees_other_files_says_so(work, tmp_path, gone):
    told, batch = work
    (path,) = map(Path, told.sizes)
    if gone:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes() + b"\n")
    (failed,) = results(told, batch)
    reason = "cannot be read: No such file or directory" if gone else "is another file here"
    assert f"{path}: {reason} - put it where every machine sees it" in str(failed.error)


# --- what cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "out.csv", "--num-actors", "2", "--address", "auto"],
         "--address, --num-actors: must come with --engine ray"),
        (["--engine", "ray"], "--engine ray needs files"),
        (["-o", "out.csv", "--engine", "ray", "--address", "ray://host:10001"], "must be auto or HOST:PORT"),
        (["-o", "out.csv", "--engine", "ray", "--device", "cuda:1"], "must be auto, cpu or cuda with --engine ray"),
        (["-o", "out.csv", "--engine", "ray", "--device", "cpu", "--gpus-per-actor", "0.5"],
         "--gpus-per-actor: must be 0 with --device cpu; got 0.5"),
        (["-o", "out.csv", "--engine", "ray", "--backend", "openvino", "--gpus-per-actor", "1"],
         "--gpus-per-actor: must be 0 with --backend openvino; got 1"),
        (["-o", "out.csv", "--engine", "ray", "--device", "cuda", "--gpus-per-actor", "0"],
         "--gpus-per-actor: must be more than 0 with --device cuda"),
        (["-o", "out.csv", "--engine", "ray", "--gpus-per-actor", "2"], "Invalid value for '--gpus-per-actor'"),
        (["-o", "out.csv", "--engine", "ray", "--num-actors", "0"], "Invalid value for '--num-actors'"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)  # fmt: skip
def test_options_that_do_not_go_together_are_refused(
    trained, corpus, tmp_path, monkeypatch, capsys, options, message
):
    from stance.cli import main

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main(["predict", str(trained), str(corpus), *options])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_without_ray_its_engine_is_refused(trained, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("stance.cluster.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"ray is not installed - pip install 'stance\[ray\]'"):
        on_cluster(trained, [corpus], tmp_path / "out.csv")


def test_a_gpu_that_cannot_be_used_is_told(cluster, trained, corpus, tmp_path):
    """The cluster says that it has one; the worker that is given it finds none."""
    with pytest.raises(CheckpointError, match=r"on .*: device: 'cuda' cannot be used"):
        predict_on_cluster(str(trained), [str(corpus)], str(tmp_path / "out.csv"), Options(), Cluster())


def test_more_than_a_machine_has_is_refused(cluster, trained, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 8.0}}])
    with pytest.raises(
        UsageError, match=r"at most what a machine of the cluster has, 0; got 0\.5 - take less"
    ):
        predict_on_cluster(
            str(trained), [str(corpus)], str(tmp_path / "out.csv"), Options(), Cluster(gpus_per_actor=0.5)
        )
