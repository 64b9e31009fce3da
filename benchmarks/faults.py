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
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faulty.jobs import Place, make_jobs
from faulty.processes import warm_up
from faulty.strikes import CLOCK, STRIKES, Campaign, Tally

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
    started = time.monotonic()
    print(
        "| fault | of | tried | survived | when it struck, or how it ended |\n| --- | --- | --- | --- | --- |"
    )
    lost = _strike(arguments)
    print(f"\n{(time.monotonic() - started) / 60:.0f} minutes, seed {arguments.seed}")
    sys.exit(lost)


def _strike(arguments: argparse.Namespace) -> bool:
    """Try all faults and print their rows; return whether anything was lost."""
    apart = "clock" in arguments.only and not os.environ.get(CLOCK) and _faketime()
    faults = [fault for fault in arguments.only if fault != "clock" or not apart]
    lost = False
    if faults:
        warm_up()
        with tempfile.TemporaryDirectory(prefix="stance-faults-") as name:
            lost = _campaign(Place(Path(name)), faults, arguments)
    return _below_faketime(apart, arguments) or lost if apart else lost


def _campaign(place: Place, faults: list[str], arguments: argparse.Namespace) -> bool:
    os.environ["XDG_CACHE_HOME"] = str(place.root / "cache")
    numbers = {fault: arguments.number if fault == "kill" else arguments.others for fault in STRIKES}
    campaign = Campaign(place, random.Random(arguments.seed), numbers)
    jobs = make_jobs(place, arguments.jobs, quick=arguments.quick)
    for job in jobs:
        job.learn(place.disk)
    for fault in faults:
        for kind in arguments.jobs:
            STRIKES[fault](campaign, [job for job in jobs if job.kind == kind])
            print(_row(fault, kind, campaign.tally(fault, kind)), flush=True)
    return any(tally.lost for tally in campaign.tallies.values())


def _faketime() -> str:
    """The library that fakes the clock; empty if it is not installed."""
    return next(iter(glob.glob("/usr/lib/*/faketime/libfaketimeMT.so.1")), "")


def _below_faketime(library: str, arguments: argparse.Namespace) -> bool:
    """Strike with the clock in a process of its own, below libfaketime, which prints its own rows."""
    with tempfile.NamedTemporaryFile("w", prefix="stance-clock-") as clock:
        print("+0", file=clock, flush=True)
        fake = {"LD_PRELOAD": library, CLOCK: clock.name, "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}  # fmt: skip
        options = [
            "--others",
            str(arguments.others),
            "--seed",
            str(arguments.seed),
            "--jobs",
            *arguments.jobs,
        ]
        options += ["--only", "clock", *(["--quick"] if arguments.quick else [])]
        done = subprocess.run(
            [sys.executable, __file__, *options],
            env={**os.environ, **fake},
            stdout=subprocess.PIPE,
            text=True,
        )
    print("".join(f"{line}\n" for line in done.stdout.splitlines() if line.startswith("| clock")), end="")
    return done.returncode != 0


def _row(fault: str, kind: str, tally: Tally) -> str:
    where = ", ".join(f"{count} {name}" for name, count in tally.where.most_common())
    told = "; ".join(part for part in (where, tally.left_out) if part)
    return f"| {fault} | {kind} | {tally.tried} | {tally.tried - len(tally.lost)} | {told} |"


if __name__ == "__main__":
    main()
