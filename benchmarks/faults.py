"""Does any fault cost finished work? Training, prediction and export, struck again and again.

Run by hand:  python benchmarks/faults.py [--number 120] [--seed 0] [--only kill power ...] [--jobs training ...]

Every command is run on tiny models in processes of its own, undisturbed first. Then faults come at it:

    kill       kill -9, at random moments, and just before or after a random operation on a file
    power      the power cut at such moments: what had not reached an ext4 disk is gone (needs root)
    full       a disk with too little room (needs root; else a limit on the size of a file)
    read-only  a disk that cannot be written: before the start, after a kill, at the end (needs root)
    clock      the clock and the files' times years back or forth (the clock needs libfaketime)
    two        two processes that write one output

After every fault the output must be the old one or the new one, whole (``stance verify`` for models), and no
progress may be lost; the command must go on; and what it leaves at last must be, byte for byte, what the
undisturbed run left, and nothing beside. A table goes to standard output; exit 1 if anything was lost.
"""

from __future__ import annotations

import os

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    "GIT_DIR": os.devnull,  # a run's record tells the commit, but git may not answer in time on a busy machine
}

import argparse
import glob
import random
import sys
import tempfile
import time
from pathlib import Path

from faulty.jobs import Place, make_jobs
from faulty.processes import warm_up
from faulty.strikes import STRIKES, Campaign

KINDS = ("training", "prediction", "export")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--number", type=int, default=120, help="kills of each kind of command")
    parser.add_argument("--others", type=int, default=40, help="other faults of each kind of command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=STRIKES, default=list(STRIKES))
    parser.add_argument("--jobs", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--quick", action="store_true", help="one command of each kind")
    arguments = parser.parse_args()
    _fake_the_clock(arguments.only)
    warm_up()
    with tempfile.TemporaryDirectory(prefix="stance-faults-") as name:
        campaign = Campaign(
            Place(Path(name)),
            random.Random(arguments.seed),
            {fault: arguments.number if fault == "kill" else arguments.others for fault in STRIKES},
        )
        os.environ["XDG_CACHE_HOME"] = str(campaign.place.root / "cache")
        started = time.monotonic()
        jobs = make_jobs(campaign.place, arguments.jobs, quick=arguments.quick)
        for job in jobs:
            job.learn(campaign.place.disk)
        for fault in arguments.only:
            for kind in arguments.jobs:
                STRIKES[fault](campaign, [job for job in jobs if job.kind == kind])
    print(_table(campaign))
    print(f"\n{(time.monotonic() - started) / 60:.0f} minutes, seed {arguments.seed}")
    sys.exit(any(tally.lost for tally in campaign.tallies.values()))


def _fake_the_clock(faults: list[str]) -> None:
    """Start anew below libfaketime, where it is installed, if the clock is to be set."""
    found = glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")
    if "clock" not in faults or not found or "FAKETIME_TIMESTAMP_FILE" in os.environ:
        return
    handle, file = tempfile.mkstemp(prefix="stance-clock-")
    os.write(handle, b"+0\n")
    fake = {"LD_PRELOAD": found[0], "FAKETIME_TIMESTAMP_FILE": file, "FAKETIME_CACHE_DURATION": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}  # fmt: skip
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **fake})


def _table(campaign: Campaign) -> str:
    lines = [
        "| fault | of | tried | survived | when it struck, or how it ended |",
        "| --- | --- | --- | --- | --- |",
    ]
    for (fault, kind), tally in campaign.tallies.items():
        where = ", ".join(f"{count} {name}" for name, count in tally.where.most_common())
        told = "; ".join(part for part in (where, tally.left_out) if part)
        lines.append(f"| {fault} | {kind} | {tally.tried} | {tally.tried - len(tally.lost)} | {told} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
