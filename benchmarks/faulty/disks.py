"""Disks that fill up, take nothing, or lose their power."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["FaultyDisk", "file_size_limit", "mountable"]


def _do(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def mountable() -> str:
    """Why no disks can be mounted here; empty if they can."""
    with tempfile.TemporaryDirectory() as name:
        try:
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", name], capture_output=True, text=True
            )
        except FileNotFoundError:
            return "there is no mount"
        if done.returncode != 0:
            return done.stderr.strip() or "mounting is not allowed"
        _do("umount", name)
    return ""


class FaultyDisk:
    """A disk mounted at a folder: in memory with a size, or an ext4 image whose power can be cut.

    Args:
        folder: where it is mounted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._image = folder.with_name(f"{folder.name}.img")

    @contextmanager
    def of_size(self, kib: int) -> Iterator[None]:
        """Mount a disk in memory of so many KiB."""
        _do("mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(self.folder))
        try:
            yield
        finally:
            self._unmount()

    def leave(self, kib: int) -> None:
        """Give the disk in memory another size: what is used and so many KiB more."""
        stat = os.statvfs(self.folder)
        used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize // 1024
        _do("mount", "-o", f"remount,size={used + kib}k", str(self.folder))

    def read_only(self, on: bool) -> None:
        """Let nothing be written, or all again."""
        _do("mount", "-o", f"remount,{'ro' if on else 'rw'}", str(self.folder))

    @contextmanager
    def of_ext4(self, mib: int = 48) -> Iterator[None]:
        """Mount an empty ext4 file system that lies in an image file.

        It is mounted as is hardest for programs: data are not ordered with the journal, and a rename
        over a file does not bring its data to the disk by itself.
        """
        with self._image.open("wb") as handle:
            handle.truncate(mib << 20)
        _do("mkfs.ext4", "-q", "-F", str(self._image))
        self._mount_image()
        shutil.rmtree(self.folder / "lost+found")
        self.sync()
        try:
            yield
        finally:
            self._unmount()
            self._image.unlink()

    def sync(self) -> None:
        """Bring all that was written to the disk."""
        _do("sync", "-f", str(self.folder))

    def cut_the_power(self) -> None:
        """Go on with what had reached the disk: a copy of the image as it lies there, mounted in its place."""
        survived = self._image.read_bytes()
        while (again := self._image.read_bytes()) != survived:  # the system was just writing to it
            survived = again
        self._unmount()
        self._image.write_bytes(survived)
        self._mount_image()

    def _mount_image(self) -> None:
        _do(
            "mount",
            "-o",
            "loop,noauto_da_alloc,data=writeback,commit=300",
            str(self._image),
            str(self.folder),
        )

    def _unmount(self) -> None:
        for _ in range(50):  # a process that was just killed may hold it for a moment
            if subprocess.run(["umount", str(self.folder)], capture_output=True).returncode == 0:
                return
            time.sleep(0.1)
        _do("umount", "-l", str(self.folder))


def file_size_limit(size: int) -> Callable[[], None]:
    """What lets a process write no file beyond ``size`` bytes: the nearest to a full disk without mounting."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
