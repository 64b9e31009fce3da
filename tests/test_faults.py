"""A small fault campaign; the large one is benchmarks/faults.py by hand (docs/reliability.md)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conftest import ROOT


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_no_fault_costs_finished_work():
    """Kills, power cuts, full and read-only disks, set clocks, two processes: a few of each."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/faults.py"), "--quick", "--number", "3", "--others", "1"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")] for line in done.stdout.splitlines() if "|" in line][
        2:
    ]
    assert len(rows) == 18
    for _, fault, kind, tried, survived, told, _ in rows:
        assert tried == survived, (fault, kind)
        assert int(tried) >= (3 if fault == "kill" else 0 if "allowed" in told or "mount" in told else 1), (
            told
        )
