"""The faults: each strikes a job in every way it knows, and sees what survived."""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from faulty import processes
from faulty.disks import FaultyDisk, file_size_limit, mountable
from faulty.jobs import Job, Lost, Place, tree
from faulty.processes import Ended, Kill

__all__ = ["CLOCK", "STRIKES", "Campaign", "Tally"]

CLOCK = "FAKETIME_TIMESTAMP_FILE"
"""Names the file that libfaketime takes its time from."""
YEARS = 10 * 365 * 86400
AMPLE = 1 << 16
"""KiB of a disk that is large enough."""


@dataclass
class Tally:
    """What was tried of one fault on one kind of command.

    Attributes:
        tried: faults that struck.
        lost: what did not survive, in words.
        where: how many struck at which stage of the work, or how they ended.
        left_out: why it was not tried, or not in full.
    """

    tried: int = 0
    lost: list[str] = field(default_factory=list)
    where: Counter[str] = field(default_factory=Counter)
    left_out: str = ""

    def count(self, where: str) -> None:
        self.tried += 1
        self.where[where] += 1


@dataclass
class Campaign:
    """The place, the dice, how many of each fault, and what came of them: (fault, kind) to tally."""

    place: Place
    rng: random.Random
    numbers: dict[str, int]
    tallies: dict[tuple[str, str], Tally] = field(default_factory=dict)

    def tally(self, fault: str, kind: str) -> Tally:
        return self.tallies.setdefault((fault, kind), Tally())

    def moment(self, job: Job) -> Kill:
        """Half of the kills come at any moment, half at a file operation or up to 4 ms after it."""
        if self.rng.random() < 0.5:
            return Kill(seconds=self.rng.uniform(0, job.seconds))
        delay = self.rng.choice([0.0, self.rng.uniform(0.0001, 0.004)])
        return Kill(operation=self.rng.randint(1, len(job.operations)), delay=delay)

    def share(self, fault: str, jobs: list[Job]) -> Iterator[tuple[Job, Tally, int]]:
        """Divide the number of a fault among jobs, the slower the fewer: each with its tally and its goal."""
        weights = [1 / math.sqrt(job.seconds) for job in jobs]
        for job, weight in zip(jobs, weights, strict=True):
            tally = self.tally(fault, job.kind)
            number = math.ceil(self.numbers[fault] * weight / sum(weights))
            print(f"{fault}: {job.kind} {job.name}", file=sys.stderr, flush=True)
            yield job, tally, tally.tried + number


@contextmanager
def losses(tally: Tally, job: Job) -> Iterator[None]:
    """Keep and tell what is lost; what is lost before a fault was counted is one tried too."""
    before = tally.tried
    try:
        yield
    except Lost as loss:
        if tally.tried == before:
            tally.count("before a fault struck")
        tally.lost.append(f"{job.name}: {loss}")
        print(f"LOST {job.kind} {job.name}: {loss}", file=sys.stderr, flush=True)


@dataclass
class Series:
    """One output from its first start to its end, by however many processes.

    Attributes:
        interruptions: how often it is killed on the way.
        after: what happens at each of them, before the output is looked at.
        during: what happens at a random moment while a process runs.
    """

    campaign: Campaign
    job: Job
    tally: Tally
    interruptions: int = 0
    after: Callable[[], object] = lambda: None
    during: Callable[[], object] | None = None

    def go(self, arguments: list[str]) -> None:
        """Interrupt, look, go on; at last let it end and compare.

        Raises:
            Lost: something did not survive.
        """
        progress, left = 0, self.interruptions
        for _ in range(self.interruptions + 4):
            ended = self._run(arguments, self.campaign.moment(self.job) if left else None)
            if not ended.clean:
                raise Lost(f"ended with {ended.code}: {ended.message[-3000:]}")
            if ended.killed:
                left -= 1
                self.after()
                self.tally.count(self.job.stage())
                progress = self._look(progress)
                arguments = self.job.again
            elif ended.code == 2 and self.job.anew and arguments != self.job.anew:
                arguments, progress = self.job.anew, 0
            else:
                return self._end(ended)
        raise Lost("did not come to an end")

    def _run(self, arguments: list[str], kill: Kill | None) -> Ended:
        disk = self.campaign.place.disk
        running = processes.launch(arguments, disk, kill)
        if self.during is not None:
            processes.pause(self.campaign.rng.uniform(0, self.job.seconds))
            self.during()
        return processes.finish(running)

    def _look(self, progress: int) -> int:
        self.job.check()
        now = self.job.progress()
        if now < progress and self.job.view() != self.job.after:
            raise Lost(f"progress went back from {progress} to {now}")
        return now

    def _end(self, ended: Ended) -> None:
        there = ended.code == 2 and "exists already" in ended.message and self.job.view() == self.job.after
        if ended.code != 0 and not there:  # an export that was there already needs no other run
            raise Lost(f"could not go on: {ended.last}")
        self.job.compare(self.campaign.place.disk)


def kill(campaign: Campaign, jobs: list[Job]) -> None:
    """kill -9, one to five times on the way."""
    for job, tally, goal in campaign.share("kill", jobs):
        while tally.tried < goal:
            with losses(tally, job):
                job.prepare(campaign.place.disk)
                Series(campaign, job, tally, _some(campaign, goal - tally.tried)).go(job.start)


def _some(campaign: Campaign, most: int) -> int:
    return min(campaign.rng.randint(1, 5), most)


def power(campaign: Campaign, jobs: list[Job]) -> None:
    """The power cut on the way, and once more as soon as the command says that it is done."""
    reason = mountable()
    disk = FaultyDisk(campaign.place.disk)
    for job, tally, goal in campaign.share("power", jobs):
        tally.left_out = reason
        while not reason and tally.tried < goal:
            with losses(tally, job), disk.of_ext4():
                job.prepare(disk.folder)
                disk.sync()
                number = _some(campaign, goal - tally.tried)
                Series(campaign, job, tally, number, disk.cut_the_power).go(job.start)
                disk.cut_the_power()
                tally.count("just after the end")
                job.compare(disk.folder)


# --- disks that do not take it -------------------------------------------------------------------


def full(campaign: Campaign, jobs: list[Job]) -> None:
    """A disk with too little room, then with enough; where none can be mounted, a limit on each file's size."""
    reason = mountable()
    for job, tally, goal in campaign.share("full", jobs):
        tally.left_out = reason and f"{reason}: instead, files beyond a size could not be written"
        for _ in range(4 * (goal - tally.tried)):  # often there is enough room
            if tally.tried == goal:
                break
            with losses(tally, job):
                (_small_files if reason else _small_disk)(campaign, job, tally)


def _small_disk(campaign: Campaign, job: Job, tally: Tally) -> None:
    disk = FaultyDisk(campaign.place.disk)
    needed = sum(-(-len(data) // 4096) * 4 + 4 for data in job.expected.values())
    with disk.of_size(AMPLE):
        job.prepare(disk.folder)
        disk.leave(round(math.exp(campaign.rng.uniform(math.log(4), math.log(3 * needed)))))
        ended = processes.run(job.start, disk.folder)
        if ended.code != 0:
            _refused(job, tally, ended, ("No space left on device", "as on a full disk"))
            disk.leave(AMPLE)
            Series(campaign, job, tally).go(job.again)


def _small_files(campaign: Campaign, job: Job, tally: Tally) -> None:
    disk = campaign.place.disk
    job.prepare(disk)
    limit = campaign.rng.randrange(max(map(len, job.expected.values())))
    ended = processes.run(job.start, disk, before=file_size_limit(limit))
    if ended.code != 0:
        _refused(job, tally, ended, ("File too large", "as on a full disk"))
        Series(campaign, job, tally).go(job.again)


def _refused(job: Job, tally: Tally, ended: Ended, signs: tuple[str, ...]) -> None:
    """See that a command that could not write says so in a line, and that nothing is broken."""
    tally.count(job.stage())
    if not ended.clean or not any(sign in ended.message for sign in signs):
        raise Lost(f"ended with {ended.code}: {ended.message[-3000:]}")
    job.check()


def read_only(campaign: Campaign, jobs: list[Job]) -> None:
    """A disk that takes nothing: before the start, after a kill, and when all is done."""
    reason = mountable()
    disk = FaultyDisk(campaign.place.disk)
    for job, tally, goal in campaign.share("read-only", jobs):
        tally.left_out = reason
        while not reason and tally.tried < goal:
            with losses(tally, job), disk.of_size(AMPLE):
                job.prepare(disk.folder)
                _nothing_changes(disk, job, tally, job.start, "before the start")
                processes.run(job.start, disk.folder, campaign.moment(job))
                _nothing_changes(disk, job, tally, job.again, "after a kill")
                Series(campaign, job, tally).go(job.again)
                _nothing_changes(disk, job, tally, job.again, "when all was done")


def _nothing_changes(disk: FaultyDisk, job: Job, tally: Tally, arguments: list[str], when: str) -> None:
    before = tree(disk.folder)
    disk.read_only(True)
    try:
        ended = processes.run(arguments, disk.folder)
    finally:
        disk.read_only(False)
    tally.count(when)
    said = "Read-only file system" in ended.message or "already" in ended.message
    if not ended.clean or not said or tree(disk.folder) != before:
        raise Lost(f"{when}: ended with {ended.code}: {ended.message[-3000:]}")


# --- clocks and company --------------------------------------------------------------------------


def clock(campaign: Campaign, jobs: list[Job]) -> None:
    """The clock and the files' times ten years back or forth, while it runs and where it was killed."""
    file = os.environ.get(CLOCK)

    def jump() -> None:
        if file:
            Path(file).write_text(f"{campaign.rng.randint(-YEARS, YEARS):+d}\n", encoding="ascii")

    def after() -> None:
        jump()
        for path in campaign.place.disk.rglob("*"):
            when = time.time() + campaign.rng.uniform(-YEARS, YEARS)
            os.utime(path, (when, when))

    for job, tally, goal in campaign.share("clock", jobs):
        tally.left_out = "" if file else "no libfaketime: only the files' times were set"
        while tally.tried < goal:
            with losses(tally, job):
                job.prepare(campaign.place.disk)
                number = _some(campaign, goal - tally.tried)
                Series(campaign, job, tally, number, after, jump).go(job.start)


def two(campaign: Campaign, jobs: list[Job]) -> None:
    """A second process on the same output, at a random moment of the first; then a third when both ended."""
    disk = campaign.place.disk
    for job, tally, goal in campaign.share("two", jobs):
        while tally.tried < goal:
            with losses(tally, job):
                job.prepare(disk)
                first = processes.launch(job.start, disk)
                processes.pause(campaign.rng.choice([0.0, campaign.rng.uniform(0, job.seconds)]))
                commands = [job.start, job.again, *([job.anew] if job.anew else [])]
                second = processes.finish(processes.launch(campaign.rng.choice(commands), disk))
                _one_of_them(job, tally, [processes.finish(first), second])
                job.compare(disk)


def _one_of_them(job: Job, tally: Tally, both: list[Ended]) -> None:
    refused = [ended for ended in both if "another process" in ended.message]
    late = [ended for ended in both if "already" in ended.message and ended not in refused]
    unfinished = [ended for ended in both if "was not finished" in ended.message]
    tally.count(
        "refused by the lock" if refused else
        "refused, as a run was under way" if unfinished else
        "too late: found it done" if late else "one after the other"
    )  # fmt: skip
    if not all(ended.clean for ended in both) or all(ended.code != 0 for ended in both):
        raise Lost(f"ended with {[ended.code for ended in both]}: {both[0].message}{both[1].message}")


STRIKES = {
    "kill": kill, "power": power, "full": full, "read-only": read_only, "clock": clock, "two": two,
}  # fmt: skip
