"""Output that no crash can spoil: parts in a work folder, joined into the whole file at the end.

Parts may come in any order; one process alone writes them.

Beside ``labelled.csv`` lies ``.labelled.csv.stance/`` while a run is under way::

    lock            held by the process that writes
    state.json      what the run is (model, input, options) and how far it is; replaced as a whole
    part-000000     rows of the output, on the disk before the state says so
    rejects-000000  rows that could not be labelled, if there were any

The output itself appears by one rename when all its bytes are on the disk; with it come
``labelled.csv.meta.json`` and, where rows were rejected, ``labelled.csv.rejects.jsonl``.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

from stance.atomic import free_lock, remove_locked, sync_folder, take_lock
from stance.checkpoint import write_json
from stance.errors import StanceError, UsageError

__all__ = ["Packed", "Progress", "WorkFolder", "meta_path", "rejects_path"]


@dataclass(frozen=True)
class Packed:
    """A part as it is stored.

    Attributes:
        number: its place among the parts of this shard, from 0.
        rows: rows of the input.
        labelled: those with labels.
        rejected: those without.
        written: rows in ``data``.
        data: the part's rows in the output's format, without a header.
        rejects: the rejected rows as JSONL.
    """

    number: int
    rows: int
    labelled: int
    rejected: int
    written: int
    data: bytes
    rejects: bytes


def meta_path(output: Path) -> Path:
    """Where the output's metadata lie: model, backend, precision, input, options."""
    return output.with_name(f"{output.name}.meta.json")


def rejects_path(output: Path) -> Path:
    """Where the rows lie that could not be labelled."""
    return output.with_name(f"{output.name}.rejects.jsonl")


@dataclass(frozen=True)
class Progress:
    """How far a run is, as its state file says.

    Attributes:
        done: the numbers of the parts that are whole, as ranges [first, beyond) that do not touch.
        rows: rows of the input in them.
        labelled: rows with labels.
        rejected: rows without.
        written: rows in the part files.
    """

    done: tuple[tuple[int, int], ...] = ()
    rows: int = 0
    labelled: int = 0
    rejected: int = 0
    written: int = 0

    def __contains__(self, number: object) -> bool:
        return isinstance(number, int) and any(first <= number < beyond for first, beyond in self.done)

    def numbers(self) -> Iterator[int]:
        """Yield the numbers of the parts that are whole, in order."""
        return itertools.chain.from_iterable(itertools.starmap(range, self.done))

    def after(self, part: Packed) -> Progress:
        """Return the progress once this part is whole too."""
        done: list[tuple[int, int]] = []
        for first, beyond in sorted([*self.done, (part.number, part.number + 1)]):
            if done and done[-1][1] == first:
                done[-1] = (done[-1][0], beyond)
            else:
                done.append((first, beyond))
        return Progress(
            tuple(done),
            self.rows + part.rows,
            self.labelled + part.labelled,
            self.rejected + part.rejected,
            self.written + part.written,
        )


class WorkFolder:
    """The work folder of one output, locked for one process.

    Args:
        output: the file to be written.
    """

    def __init__(self, output: Path):
        self.output = output
        self.path = output.with_name(f".{output.name}.stance")
        self.progress = Progress()
        self._identity: dict[str, Any] = {}
        self._lock: int | None = None

    def exists(self) -> bool:
        """Whether a run of this output has rows done and is not finished."""
        try:
            stored = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            return bool(stored["progress"]["rows"])
        except FileNotFoundError:
            return False
        except (OSError, ValueError, KeyError, TypeError):
            return True

    def check_free(self) -> None:
        """Raise :class:`UsageError` if another process writes this output."""
        with suppress(OSError):  # of a disk that cannot be written
            free_lock(take_lock(self.path / "lock", self.output))

    def open(self, identity: Mapping[str, Any], *, resume: bool, force: bool = False) -> Progress:
        """Take the lock and begin, or go on where the state file says.

        Raises:
            UsageError: another process writes this output, or has just written it and ``force`` is not given;
                or an earlier run of it was of another model, input or options.
        """
        self._identity = json.loads(json.dumps(identity))
        try:
            self._lock = take_lock(self.path / "lock", self.output)
            sync_folder(self.path.parent)
        except OSError as error:
            raise UsageError(
                f"{self.output}: cannot be written: {error.strerror or error} - choose another place"
            ) from None
        try:
            if resume and self.exists():
                self.progress = self._stored()
            elif self.output.exists() and not force:
                if not self.exists():
                    self.discard()
                raise UsageError(
                    f"{self.output}: another process has just written it - look at it, or replace it with --force"
                )
            else:
                self._begin()
        except BaseException:
            self.close()
            raise
        return self.progress

    def _begin(self) -> None:
        self._forget()
        for path in self.path.iterdir():
            if path.name != "lock":
                path.unlink()
        self._save()

    def _stored(self) -> Progress:
        path = self.path / "state.json"
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            progress, identity = Progress(**stored["progress"]), stored["identity"]
            progress = replace(progress, done=tuple((first, beyond) for first, beyond in progress.done))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}: cannot be read: {error} - begin anew with --force") from None
        for name, value in self._identity.items():
            if identity.get(name) != value:
                raise UsageError(
                    f"{self.output}: --resume must go on with the same {name}; got {_short(value)}, the run "
                    f"was begun with {_short(identity.get(name))} - give the same, or begin anew with --force"
                )
        return progress

    def part(self, number: int, kind: str = "part") -> Path:
        """The file of a part."""
        return self.path / f"{kind}-{number:06d}"

    def keep(self, part: Packed) -> None:
        """Bring a part to the disk, then say so in the state.

        Raises:
            StanceError: it cannot be written, as on a full disk.
        """
        with self.writing(self.part(part.number)) as handle:
            handle.write(part.data)
        rejects = self.part(part.number, "rejects")
        rejects.unlink(missing_ok=True)
        if part.rejects:
            with self.writing(rejects) as handle:
                handle.write(part.rejects)
        self.commit(self.progress.after(part))

    def commit(self, progress: Progress) -> None:
        """Say that the rows of ``progress`` are done; their part files are on the disk already."""
        sync_folder(self.path)
        self.progress = progress
        self._save()

    def _save(self) -> None:
        write_json(self.path / "state.json", {"identity": self._identity, "progress": asdict(self.progress)})
        sync_folder(self.path)

    @contextmanager
    def writing(self, path: Path) -> Iterator[IO[bytes]]:
        """Open a file that is on the disk when the block ends.

        Raises:
            StanceError: it cannot be written, as on a full disk.
        """
        try:
            with path.open("wb") as handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise StanceError(
                f"{self.output}: cannot be written: {error.strerror or error} - mend that and go on with "
                "--resume; what was done is kept"
            ) from None

    def finish(self, meta: Mapping[str, Any], join: Callable[[IO[bytes], Sequence[Path]], None]) -> None:
        """Join the parts into the output, show it with its companions, and remove the work folder."""
        whole, rejects = self.path / "whole", self.path / "rejects"
        numbers = list(self.progress.numbers())
        with self.writing(whole) as handle:
            join(handle, [self.part(n) for n in numbers])
        rejected = [p for n in numbers if (p := self.part(n, "rejects")).is_file()]
        if rejected:
            with self.writing(rejects) as handle:
                for path in rejected:
                    handle.write(path.read_bytes())
            os.replace(rejects, rejects_path(self.output))
        else:
            rejects_path(self.output).unlink(missing_ok=True)
        write_json(meta_path(self.output), meta)
        os.replace(whole, self.output)
        sync_folder(self.output.parent)
        self.discard()

    def discard(self) -> None:
        """Remove the work folder and give the lock back."""
        self._forget()
        remove_locked(self.path)
        sync_folder(self.output.parent)
        self.close()

    def _forget(self) -> None:
        """Remove the state before the parts it tells of: killed between, there is nothing to resume."""
        try:
            (self.path / "state.json").unlink(missing_ok=True)
        except OSError:
            return  # then the parts cannot be removed either
        sync_folder(self.path)

    def clear(self) -> None:
        """Remove what a run left that was killed when its output was there."""
        if self.path.is_dir():
            with suppress(UsageError, OSError):
                self._lock = take_lock(self.path / "lock", self.output)
                self.discard()

    def close(self) -> None:
        """Give the lock back; the work stays for --resume."""
        if self._lock is not None:
            free_lock(self._lock)
            self._lock = None


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
