"""One process a folder: locks that die with their holder, leftovers that the next one clears."""

import errno
import os
import shutil
import signal

import pytest

from lizard_models.files import folders, locks
from lizard_models.files.folders import KeptDraft, appear_whole, drafts_of, remove_stale, sync_all, write_whole
from lizard_models.files.locks import LOCK, FolderLock


def in_child(work) -> tuple[int, int]:
    """A forked process that does ``work`` and then waits to be killed; its id, once the work is done."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
            os.write(write, b"done")
            signal.pause()
        finally:
            os._exit(1)
    os.close(write)
    assert os.read(read, 4) == b"done"
    os.close(read)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_lock_is_held_by_one_process_and_ends_with_it(tmp_path):
    child = in_child(lambda: FolderLock(tmp_path, print).take())
    ours = FolderLock(tmp_path, print)
    assert ours.take().startswith(f"process {child} on ")
    kill(child)
    assert ours.take() == "" and ours.take() == ""  # a dead one's blocks nobody, our own not ourselves
    assert f"process {os.getpid()} on " in FolderLock(tmp_path, print).take()
    ours.release()
    assert FolderLock(tmp_path, print).take() == ""


def test_a_folder_that_its_holder_removes_is_not_ours(tmp_path, monkeypatch):
    """The lock is of the folder that is there, not of one that is gone."""
    work = tmp_path / "work"
    work.mkdir()
    original, removed = locks.try_lock, []

    def slow(descriptor):
        if not removed:
            removed.append(shutil.rmtree(work))
            work.mkdir()
        return original(descriptor)

    monkeypatch.setattr(locks, "try_lock", slow)
    ours = FolderLock(work, print)
    assert ours.take() == "" and (work / LOCK).is_file()
    assert f"process {os.getpid()}" in FolderLock(work, print).take()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_named(tmp_path, monkeypatch, number):
    def none(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", none)
    said = []
    assert FolderLock(tmp_path, said.append).take() == ""
    assert len(said) == 1 and str(tmp_path) in said[0] and "has no locks" in said[0]
    monkeypatch.setattr(locks.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output")))
    with pytest.raises(OSError, match="Input/output"):
        FolderLock(tmp_path, said.append).take()


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path):
    target = tmp_path / "out"

    def begin() -> None:
        manager = appear_whole(target)
        (manager.__enter__() / "half").write_text("1")
        begin.manager = manager  # else it would end here

    child = in_child(begin)
    (alive,) = drafts_of(target)
    assert remove_stale(target) == [alive]
    kill(child)
    (tmp_path / ".out.json").write_text("mine")
    (tmp_path / ".out.mine").mkdir()  # not a name that we give
    with appear_whole(target) as draft:
        assert drafts_of(target) == [draft] != [alive]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.json", ".out.mine", "out"]


def test_what_was_kept_is_never_taken_for_a_leftover(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(KeptDraft), appear_whole(target) as draft:
        (draft / "whole").write_text("1")
        target.write_text("in the way")
    target.unlink()
    with appear_whole(target) as again:
        (again / "whole").write_text("2")
    assert (draft / "whole").read_text() == "1" and (target / "whole").read_text() == "2"


def test_everything_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    """The order of fsync and rename, which no test can see otherwise without a power cut."""
    done = []
    fsync, rename, replace = os.fsync, folders.Path.rename, folders.Path.replace

    def synced(descriptor):
        done.append(("sync", os.readlink(f"/proc/self/fd/{descriptor}").removeprefix(f"{tmp_path}/")))
        return fsync(descriptor)

    def renamed(self, target):
        done.append(("rename", target.name))
        return rename(self, target) if self.is_dir() else replace(self, target)

    monkeypatch.setattr(folders.os, "fsync", synced)
    monkeypatch.setattr(folders.Path, "rename", renamed)
    monkeypatch.setattr(folders.Path, "replace", renamed)
    with appear_whole(tmp_path / "out") as draft:
        (draft / "a").mkdir()
        (draft / "a" / "b").write_text("1")
    end = done.index(("rename", "out"))
    assert {path for kind, path in done[:end] if kind == "sync"} == {
        draft.name,
        f"{draft.name}/a",
        f"{draft.name}/a/b",
    }
    assert done[end + 1 :] == [("sync", str(tmp_path))]
    done.clear()
    write_whole(tmp_path / "x.json", "1")
    assert [kind for kind, _ in done] == ["sync", "rename", "sync"] and done[0][1].startswith(".x.json.")


def test_folders_that_cannot_be_synced_are_no_error_and_files_are(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("1")

    def refuse(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument") if refused(descriptor) else OSError(errno.EIO, "Input/output")

    monkeypatch.setattr(folders.os, "fsync", refuse)
    refused = lambda descriptor: True  # noqa: E731
    with pytest.raises(OSError, match="Invalid"):
        sync_all(tmp_path)
    (tmp_path / "file").unlink()
    sync_all(tmp_path)
    refused = lambda descriptor: False  # noqa: E731
    with pytest.raises(OSError, match="Input"):
        sync_all(tmp_path)
