"""What several benchmarks measure: the machine, its matrix products, and the work that statements need."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def machine(device: str = "cpu") -> dict[str, Any]:
    """Return what a figure depends on."""
    import torch
    import transformers

    known = {
        "date": time.strftime("%Y-%m-%d"),
        "processor": platform.processor() or platform.machine(),
        "capabilities": {
            k: v
            for k, v in torch.cpu.get_capabilities().items()
            if k in ("cpu_name", "amx_bf16", "avx512_bf16", "num_physical_cores")
        },
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if device != "cpu":
        known["gpu"] = torch.cuda.get_device_name(device)
        known["cuda"] = torch.version.cuda
    return known


def peak_of(process: subprocess.Popen[Any]) -> float:
    """Return the most memory in MB that a process has held so far; 0 once it has ended (Linux).

    Of the process alone: ``ru_maxrss`` counts what its parent held when it was forked as well.
    """
    try:
        lines = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def wait_for(device: str) -> None:
    """Let a GPU finish its work before a clock is read."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def product_rate(product: Callable[..., Any], a: Any, b: Any, device: str, seconds: float = 2.0) -> float:
    """Return the GFLOP/s (multiply-adds counted twice) of a matrix product of ``a`` [m, k] and ``b`` [k, n]."""
    operations = 2e-9 * a.shape[0] * a.shape[1] * b.shape[1]
    product(a, b)
    wait_for(device)
    start, count, spent = time.perf_counter(), 0, 0.0
    while spent < seconds:
        for _ in range(10 if device != "cpu" else 1):
            product(a, b)
            count += 1
        wait_for(device)
        spent = time.perf_counter() - start
    return operations * count / spent


def encoder_operations(config: dict[str, Any], lengths: np.ndarray[Any, Any]) -> float:
    """Return the operations of one forward pass over sequences of these lengths in tokens, without padding.

    The matrix products of the layers alone, multiply-adds counted twice. ``config`` is that of a BERT-like
    encoder, or of a model around one.
    """
    config = config.get("encoder") or config
    hidden, inner, layers = (config[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    sizes = lengths.astype(float)
    linear = 2 * (4 * hidden * hidden + 2 * hidden * inner) * sizes.sum()
    attention = 4 * hidden * (sizes**2).sum()
    return float(layers * (linear + attention))
