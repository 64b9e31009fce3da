"""A small fault campaign; the large one is benchmarks/faults.py by hand (docs/reliability.md)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from conftest import ROOT

CAMPAIGN = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "benchmarks")])}
HANDLES = """
import os
from pathlib import Path
from faulty.processes import run

def handles():
    return len(os.listdir("/proc/self/fd"))

before = handles()
assert run(["--version"], Path("/nowhere")).code == 0
assert handles() == before, handles() - before
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="only Linux tells them")
def test_a_campaign_of_any_length_needs_no_more_open_files():
    done = subprocess.run(
        [sys.executable, "-c", HANDLES], capture_output=True, text=True, check=False, env=CAMPAIGN
    )
    assert done.returncode == 0, done.stderr


ALWAYS_LOST = """
import random
from types import SimpleNamespace
from faulty.jobs import Lost
from faulty.strikes import Campaign, kill

def prepare(disk):
    raise Lost("at once")

job = SimpleNamespace(kind="training", name="x", seconds=1.0, start=[], prepare=prepare)
campaign = Campaign(SimpleNamespace(disk=None), random.Random(0), {"kill": 2})
kill(campaign, [job])
assert campaign.tally("kill", "training").tried == 2
"""


def test_a_campaign_ends_though_every_round_is_lost_before_a_fault():
    done = subprocess.run(
        [sys.executable, "-c", ALWAYS_LOST],
        capture_output=True, text=True, check=False, timeout=120, env=CAMPAIGN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


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
