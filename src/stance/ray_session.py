"""A Ray cluster for the time of a run: joined or started, its noise and its errors made ours."""

from __future__ import annotations

import io
import logging
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout

from stance.errors import StanceError, UsageError, first_line
from stance.hardware import cores

__all__ = ["ray_session"]


@contextmanager
def ray_session(address: str | None, processes: int | None, log: Callable[[str], None]) -> Iterator[None]:
    """Be connected to Ray; what it raises comes as one message, what it prints goes to the log.

    Args:
        address: ``HOST:PORT`` or ``auto``; None: that of ``RAY_ADDRESS``, else a Ray of this machine's own.
        processes: how many must fit into a Ray that is started here.
        log: told what Ray tells of workers that died.

    Raises:
        UsageError: no Ray answers at the address.
        StanceError: what Ray could not mend.
    """
    with _connected(address, processes), _ray_errors(), redirect_stdout(_Told(log)):
        yield


@contextmanager
def _connected(address: str | None, processes: int | None) -> Iterator[None]:
    """Join the cluster, or start a Ray of this machine's own; where there is one already, use that."""
    import ray

    if ray.is_initialized():
        yield
        return
    # Ray would report its use over the network, and write its debugging to standard error.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    here = {"num_cpus": max(cores(), processes or 0), "include_dashboard": False}
    try:
        with _hushed():
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                log_to_driver=False,
                **(here if address == "local" else {}),
            )
    except Exception as error:  # Ray has many kinds
        raise UsageError(
            f"--address: no Ray answers at {address}: {first_line(error)} - start one with ray start --head, set "
            "RAY_AUTH_MODE=token if it asks for its token, or leave --address out"
        ) from None
    try:
        with _terminable():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _hushed() -> Iterator[None]:
    """Keep off standard error what Ray's C++ parts write there before they know their log level."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextmanager
def _terminable() -> Iterator[None]:
    """Leave with 143 on SIGTERM, after Ray is shut down; Ray's own handler leaves with another code."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _ray_errors() -> Iterator[None]:
    """Turn what Ray raises into one clear message."""
    import ray.data  # sets its logger up
    from ray.data.exceptions import ExecutionTimeoutError, SystemException
    from ray.exceptions import RayError

    logger = logging.getLogger(ray.data.__name__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it prints the stack of every error that it raises too
    try:
        yield
    except (RayError, ExecutionTimeoutError, SystemException) as error:
        cause = getattr(error, "cause", None) or error
        raise StanceError(f"Ray: {type(cause).__name__}: {first_line(cause)}") from error
    finally:
        logger.setLevel(level)


class _Told(io.TextIOBase):
    """What Ray prints of dead workers, which would stand in the way of data on standard output."""

    def __init__(self, log: Callable[[str], None]):
        self._log = log

    def write(self, text: str) -> int:
        for line in text.splitlines():
            if line.strip():
                self._log(re.sub(r"\x1b\[[0-9;]*m", "", line))
        return len(text)
