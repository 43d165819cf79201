"""Folders that are absent or whole: room for what comes, no half-written ones, sums of what they hold."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lizard_models.files.locks import try_lock

SUMS = "SHA256SUMS"
RANDOM = "[a-z0-9_]{8}"  # what mkdtemp puts after a draft's name


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_space(folder: Path, needed: int, what: str, argument: str = "out") -> None:
    """Raises ValueError if the disk of ``folder`` has fewer than ``needed`` bytes free.

    what and argument: what the message calls the bytes, and the argument that chose the folder, which need not
    exist yet.
    """
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise ValueError(
            f"{argument}: {what} takes about {_size(needed)}, but the disk of {str(disk)!r} has "
            f"{_size(free)} free: free some space, or give `{argument}` on another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def damaged(folder: Path) -> list[str]:
    """Files of ``folder`` that are not what ``write_sums`` found; none for a folder without sums.

    Raises ValueError for sums that cannot be read.
    """
    sums = folder / SUMS
    if not sums.is_file():
        return []
    try:
        recorded = [line.split("  ", 1) for line in sums.read_text().splitlines()]
    except UnicodeDecodeError:
        recorded = [[]]
    for number, line in enumerate(recorded, 1):
        if len(line) != 2 or not re.fullmatch("[0-9a-f]{64}", line[0]) or Path(line[1]).name != line[1]:
            raise ValueError(f"{sums} is damaged (line {number} is no sum and name of a file): copy the folder again")
    return [name for sha256, name in recorded if not (folder / name).is_file() or sha256_of(folder / name) != sha256]


def write_sums(folder: Path) -> None:
    """Writes the sha256 of every file of ``folder`` beside them, in the form that ``sha256sum -c`` reads."""
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.is_file()]
    (folder / SUMS).write_text("".join(lines))


def write_whole(path: Path, text: str) -> None:
    """Writes a small file so that it is the old one or the new one, whatever stops the write, a power cut too."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        draft.write_text(text)
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Returns when a file, or a folder's list of names, is on the disk and no longer in memory alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems have nothing to do for a folder
            raise
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """``sync`` of everything in a folder, and of itself."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


class KeptDraft(ValueError):
    """What was written is whole, but could not be moved to where it was wanted; the message says where it is."""


@contextlib.contextmanager
def appear_whole(target: Path, *, shared: bool = True) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` and renames it to ``target`` if the body succeeds.

    So ``target`` is absent or complete, whatever stops the body: an error, a full disk, Ctrl-C; what the body wrote
    until then is removed. shared: several processes may make the same folder, as in a cache. Then one that is there
    already with every file of ours is kept and ours is removed.

    Raises KeptDraft where the finished folder cannot be renamed; it is kept then, and the message names it.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_stale(target)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    mark = os.open(draft, os.O_RDONLY)
    try:
        try_lock(mark)  # for as long as this process lives, nobody takes it for a leftover
        yield draft
        _open_to_others(draft)
        sync_all(draft)
    except BaseException:
        os.close(mark)
        shutil.rmtree(draft, ignore_errors=True)
        raise
    try:
        move_whole(draft, target, "cache" if shared else "out")
    except KeptDraft:
        if not shared or not target.is_dir() or not _files(draft) <= _files(target):
            raise
        shutil.rmtree(draft, ignore_errors=True)
    finally:
        os.close(mark)


def _open_to_others(folder: Path) -> None:
    """Gives each file the mode of a new one: safetensors makes its files private, whatever the umask says."""
    mask = os.umask(0)
    os.umask(mask)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o666 & ~mask)


def drafts_of(target: Path) -> list[Path]:
    """What ``appear_whole`` began beside ``target`` and did not end: being written, left by a kill, or kept."""
    name = re.compile(re.escape(f".{target.name}.") + RANDOM)
    return sorted(p for p in target.parent.glob(".*") if name.fullmatch(p.name) and p.is_dir())


def remove_stale(target: Path) -> list[Path]:
    """Removes what processes that are dead left half-written beside ``target``. Returns what is left of ``drafts_of``.

    Those stay that another process is writing, and finished ones, which only could not be moved.
    """
    for draft in drafts_of(target):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another process was quicker, or another user's
            finished = draft.stat().st_mode & 0o055  # ``move_whole`` opens them to others
            mark = os.open(draft, os.O_RDONLY)
            try:
                if not finished and try_lock(mark):
                    shutil.rmtree(draft, ignore_errors=True)
            finally:
                os.close(mark)
    return drafts_of(target)


def move_whole(draft: Path, target: Path, argument: str = "out") -> None:
    """Renames a finished folder. Raises KeptDraft, and leaves it where it is, if that fails.

    argument: what the message says the target came from.
    """
    try:
        draft.chmod(0o755)  # mkdtemp makes it private
        draft.rename(target)
        sync(target.parent)
    except OSError as error:
        if target.is_dir():
            names = sorted(path.name for path in target.iterdir())
            reason = f"a folder is there, which holds {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
        elif target.exists():
            reason = "a file is there"
        else:
            reason = error.strerror or str(error)
        raise KeptDraft(
            f"{argument}: what was made could not be moved to {str(target)!r} ({reason}); it is whole, and kept in "
            f"{str(draft)!r}: move it to another place yourself, nothing of it was deleted"
        ) from error


def _files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
