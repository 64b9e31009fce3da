"""The machine, told without torch: its processor, its libraries, the place for what may be kept between runs."""

from __future__ import annotations

import os
import platform
from pathlib import Path

__all__ = ["cache_folder", "cores", "has_fast_bf16", "installed_version", "processor"]


def cache_folder() -> Path:
    """Return the folder of what only saves time: ``stance`` below ``XDG_CACHE_HOME``, by default ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "stance"


def installed_version(library: str) -> str:
    """Return the version of an installed library, without importing it; empty if it is not there."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def has_fast_bf16() -> bool:
    """Whether the processor multiplies bf16 matrices in hardware: AMX or AVX512-BF16."""
    if platform.machine() in ("arm64", "aarch64"):
        return False
    flags = processor().split("\n")[-1].split()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def processor() -> str:
    """Return the processor's name and flags, a line each; little where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return f"{found.get('model name', '')}\n{found.get('flags', '')}"


def cores() -> int:
    """Return the number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
