"""``stance predict --engine ray``: the parts of a run labelled by many processes, one model in each.

Ray Data's ``map_batches`` runs :class:`stance.actors.PartLabeller`, a callable class that holds a model. The rows of
its dataset are not statements but stretches of parts, told by the files and places where they lie
(:meth:`stance.source.Source.blocks`): Ray's own readers guess types, know no line numbers and cut where they like,
whereas a part read by :mod:`stance.source` is the one that a run in one process has, down to its batches, its bad
rows and its bytes. The driver plans, has a worker choose the backend once for all, alone writes what comes back,
and joins it; so the disk's rules (:mod:`stance.parts`) and ``--resume`` are those of one process, and either
engine goes on with a run of the other.

A part is a function of the input and the model. Where a process or a machine dies, Ray gives its stretch to
another; what had arrived is kept, what comes twice is dropped.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from stance.actors import Failed, Order, PartLabeller, Work, choose
from stance.errors import StanceError, UsageError
from stance.labelling import Chosen
from stance.layout import Layout
from stance.parts import Packed, Progress
from stance.predicting import Pending, Run, Summary
from stance.ray_session import ray_session
from stance.request import Options, check_call, expected_rows
from stance.source import Block, Source, input_errors

__all__ = ["Cluster", "check_cluster_call", "predict_on_cluster"]

STRETCH = 16
"""Parts that an actor takes at once, at most: a file's start is found, and a part sent, so many times less often."""


@dataclass(frozen=True)
class Cluster:
    """Where and on how much a run is computed.

    Attributes:
        address: ``HOST:PORT`` or ``auto``; None: that of ``RAY_ADDRESS``, else a Ray on this machine for this run.
        num_actors: processes with a model each; None: as many as fit.
        gpus_per_actor: 0 for the processor, to 1; None: 1 where the cluster has GPUs that the model can use.
    """

    address: str | None = None
    num_actors: int | None = None
    gpus_per_actor: float | None = None


def check_cluster_call(
    paths: Sequence[str], output: str, cluster: Cluster, *, device: str = "auto", backend: str = "auto"
) -> None:
    """Refuse what a cluster cannot do, before it is asked.

    Raises:
        UsageError: Ray is not installed, or options exclude each other.
    """
    if find_spec("ray") is None:
        raise UsageError("--engine ray: ray is not installed - pip install 'stance[ray]'")
    if "-" in (output, *paths):
        raise UsageError("--engine ray needs files: standard input and output are one process's - give names")
    if cluster.address is not None and "://" in cluster.address:
        raise UsageError(
            f"--address: must be auto or HOST:PORT; got {cluster.address!r} - run on a machine of the cluster, "
            "or through ray job submit"
        )
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(
            f"--device: must be auto, cpu or cuda with --engine ray; got {device!r} - Ray gives each actor its GPU"
        )
    gpus = cluster.gpus_per_actor
    if gpus and (device == "cpu" or backend in ("onnxruntime", "openvino")):
        other = f"--device {device}" if device == "cpu" else f"--backend {backend}"
        raise UsageError(f"--gpus-per-actor: must be 0 with {other}; got {gpus:g} - leave one of them out")
    if gpus == 0 and device == "cuda":
        raise UsageError("--gpus-per-actor: must be more than 0 with --device cuda - leave one of them out")


def predict_on_cluster(
    model: str,
    paths: Sequence[str],
    output: str,
    options: Options,
    cluster: Cluster,
    *,
    device: str = "auto",
    backend: str = "auto",
    exact: bool = False,
    resume: bool = False,
    force: bool = False,
    log: Callable[[str], None] = lambda line: None,
    show_progress: bool = False,
) -> Summary:
    """Label the rows of files as :func:`stance.predicting.predict_files`, by the actors of a Ray cluster.

    Every machine must see the model and the input under the same paths; the output is written here.

    Args:
        model: the folder of a model, or its id on the hub.
        cluster: where to run.
        device, backend, exact: see :func:`stance.inference.load`; chosen once, on one machine, for all.
        paths, output, options, resume, force, log, show_progress: see :func:`stance.predicting.predict_files`.

    Raises:
        UsageError: as there; see also :func:`check_cluster_call`; or no Ray answers at the address.
        DataError: a row cannot be labelled, with ``on_error="fail"``: the first one of the input.
        StanceError: what Ray could not mend; what was done is kept for ``resume``.
    """
    check_cluster_call(paths, output, cluster, device=device, backend=backend)
    check_call(paths, output, options, resume=resume, force=force)
    with ray_session(cluster.address, cluster.num_actors, log):
        cluster = _sized(cluster, model, device, backend, log)
        place = "cuda" if cluster.gpus_per_actor else "cpu"
        order = Order(model, options, place, backend, exact, expected_rows(paths), os.getcwd())
        chosen = _chosen(order, cluster, log)
        run = Run(chosen, paths, output, options, log, show_progress)
        sizes = {path: file["size"] for path, file in zip(paths, run.identity["input"], strict=True)}

        def labelled(source: Source, layout: Layout, done: Progress) -> Generator[Pending]:
            with input_errors():
                blocks = [block for block in source.blocks() if block.number not in done]
            for part in _in_actors(blocks, Work(chosen, layout, sizes, order.folder), cluster):
                yield part.rows, partial(_same, part)

        summary = run.to_file(labelled, resume=resume, force=force)
    return replace(summary, backend=f"{summary.backend}, by Ray")


def _same(part: Packed) -> Packed:
    return part


def _sized(cluster: Cluster, model: str, device: str, backend: str, log: Callable[[str], None]) -> Cluster:
    """Fill in how many actors and GPUs there will be."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    gpus = cluster.gpus_per_actor
    most = max((machine.get("GPU", 0.0) for machine in machines), default=0.0)
    if gpus is None:
        usable = backend in ("auto", "torch") and (
            not Path(model).is_dir() or Path(model, "model.safetensors").is_file()
        )
        gpus = 1.0 if device == "cuda" or (device == "auto" and usable and most >= 1) else 0.0
    if gpus > most:
        raise UsageError(
            f"--gpus-per-actor: must be at most what a machine of the cluster has, {most:g}; got {gpus:g} - take less, "
            "or --device cpu"
        )
    room = sum(
        min(int(machine.get("CPU", 0)), int(machine.get("GPU", 0) / gpus) if gpus else sys.maxsize)
        for machine in machines
    )
    actors = cluster.num_actors or max(room, 1)
    if actors > room:
        log(f"the cluster has room for {room} of {actors} actors now; the others wait")
    return replace(cluster, num_actors=actors, gpus_per_actor=gpus)


def _chosen(order: Order, cluster: Cluster, log: Callable[[str], None]) -> Chosen:
    """Have a worker like those that will label choose the backend."""
    import ray

    task = ray.remote(choose).options(num_cpus=1, num_gpus=cluster.gpus_per_actor)
    found, notes = ray.get(task.remote(order))
    for note in notes:
        log(note)
    if isinstance(found, StanceError):
        raise found
    chosen: Chosen = found
    return chosen


# --- the driver ----------------------------------------------------------------------------------


def _in_actors(blocks: Sequence[Block], work: Work, cluster: Cluster) -> Iterator[Packed]:
    """Yield the parts of the blocks as they are labelled; the first failure of the input ends that."""
    failed: dict[int, StanceError] = {}
    waiting = {block.number for block in blocks}
    for part in _streamed(blocks, work, cluster):
        if part.number not in waiting:
            continue  # of a stretch that was begun again
        waiting.remove(part.number)
        if isinstance(part, Failed):
            failed[part.number] = part.error
        else:
            yield part
        # Those before it may fail too, and are told first then, as they would be by one process.
        if failed and min(failed) < min(waiting, default=sys.maxsize):
            break
    if failed:
        raise failed[min(failed)]
    if waiting:
        raise StanceError(f"Ray: {len(waiting)} parts did not come back - go on with --resume")


def _streamed(blocks: Sequence[Block], work: Work, cluster: Cluster) -> Iterator[Packed | Failed]:
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    if not blocks:
        return
    actors = cluster.num_actors or 1
    size = max(1, min(STRETCH, len(blocks) // (4 * actors)))
    rows = [{"blocks": pickle.dumps(blocks[at : at + size])} for at in range(0, len(blocks), size)]
    context = DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.target_max_block_size = 1  # each part is sent as soon as it is done
    context.max_consecutive_actor_init_deaths = 3  # killed while it loads, an actor is replaced too
    with DataContext.current(context):
        labelled = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
            PartLabeller,
            fn_constructor_args=(work,),
            batch_size=1,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=min(actors, len(rows))),
            num_cpus=1,
            num_gpus=cluster.gpus_per_actor or None,
        )
        for batch in labelled.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for cell in batch.column("part"):
                yield pickle.loads(cell.as_py())
