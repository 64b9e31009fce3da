"""Files and folders that are whole or not there, and locks of one process."""

from __future__ import annotations

import errno
import os
from contextlib import closing

import pytest

from stance import atomic
from stance.atomic import NewFolder, free_lock, hold, replacing, take_lock
from stance.errors import UsageError


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(TypeError), replacing(path) as handle:
        handle.write("half" if handle.write(b"half") else "")
    assert path.read_text() == "old"
    with replacing(path) as handle:
        handle.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_a_file_and_its_name_are_on_the_disk_when_it_is_there(tmp_path, monkeypatch):
    done: list[str] = []
    real = os.fsync, os.replace

    def fsync(handle):
        done.append("sync of a folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "sync")
        real[0](handle)

    def replace(*names):
        done.append("rename")
        real[1](*names)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with replacing(tmp_path / "a.json") as handle:
        handle.write(b"{}")
    assert done == ["sync", "rename", "sync of a folder"]


def test_a_lock_is_one_processs_and_leaves_nothing(tmp_path):
    path, output = tmp_path / "work" / "lock", tmp_path / "out"
    with hold(path, output):
        with pytest.raises(UsageError, match="out: another process is writing it - wait, or choose another"):
            take_lock(path, output)
        assert path.exists()
    assert not path.exists()
    free_lock(take_lock(path, output))


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    pid = os.fork()
    if pid == 0:
        take_lock(tmp_path / "lock", tmp_path)
        os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert (tmp_path / "lock").exists()
    free_lock(take_lock(tmp_path / "lock", tmp_path))


def test_the_lock_of_a_killed_process_is_free_though_one_that_it_forked_lives_on(tmp_path):
    reader, writer = os.pipe()
    if os.fork() == 0:
        take_lock(tmp_path / "lock", tmp_path)
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)  # until the test is done with it
            os._exit(0)
        os.kill(os.getpid(), 9)
    os.close(reader)
    os.wait()
    free_lock(take_lock(tmp_path / "lock", tmp_path))
    os.close(writer)


def test_a_forked_process_takes_no_lock_from_its_parent(tmp_path):
    with hold(tmp_path / "lock", tmp_path):
        pid = os.fork()
        if pid == 0:
            os._exit(0)
        os.waitpid(pid, 0)
        with pytest.raises(UsageError, match="another process is writing it"):
            take_lock(tmp_path / "lock", tmp_path)


@pytest.mark.parametrize("in_one_step", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, in_one_step):
    if not in_one_step:
        monkeypatch.setattr(atomic, "swap", lambda one, other: False)
    for text in ("first", "second"):
        new = NewFolder(tmp_path / "out")
        (new.path / "file").write_text(text)
        new.commit()
        new.close()
        assert (tmp_path / "out" / "file").read_text() == text
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("what", [KeyboardInterrupt, OSError])
def test_what_comes_between_two_renames_costs_no_folder(tmp_path, monkeypatch, what):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("earlier")
    new = NewFolder(tmp_path / "out")

    def strike(folder):
        monkeypatch.undo()
        raise what

    monkeypatch.setattr(atomic, "swap", lambda one, other: False)
    monkeypatch.setattr(atomic, "sync_folder", strike)
    with pytest.raises(what), closing(new):
        new.commit()
    assert (tmp_path / "out" / "file").read_text() == "earlier"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_be_put_back_now_is_put_back_by_the_next(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("earlier")
    new, rename = NewFolder(tmp_path / "out"), os.rename

    def once(source, target):
        if target == tmp_path / "out":
            raise OSError(errno.ESTALE, "Stale file handle")
        rename(source, target)

    monkeypatch.setattr(atomic, "swap", lambda one, other: False)
    monkeypatch.setattr(os, "rename", once)
    with pytest.raises(OSError, match="Stale"), closing(new):
        new.commit()
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    NewFolder(tmp_path / "out").close()
    assert (tmp_path / "out" / "file").read_text() == "earlier"


def test_folders_change_places_in_one_step(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name / name).mkdir(parents=True)
    if not atomic.swap(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot")
    assert (tmp_path / "one" / "other").is_dir()
    assert (tmp_path / "other" / "one").is_dir()


def test_a_folder_that_a_killed_process_had_put_aside_comes_back(tmp_path):
    aside, half = tmp_path / ".out.stance" / "old", tmp_path / ".out.stance" / "new"
    for folder in (aside, half):
        folder.mkdir(parents=True)
        (folder / "file").write_text(folder.name)
    new = NewFolder(tmp_path / "out")
    assert (tmp_path / "out" / "file").read_text() == "old"
    assert list(new.path.iterdir()) == []
    new.close()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
