"""Trials in forks of this process, some at the same time."""

from __future__ import annotations

import json
import os
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Pool:
    """Forks that each do one piece of work in an empty folder. A context manager, which waits for all at its end."""

    def __init__(self, folder: Path, workers: int, done: Callable[[str, dict[str, Any]], None]) -> None:
        """done: gets the name and the result, as JSON has it, of each piece of work."""
        self.folder, self.done = folder, done
        self.free = [folder / f"trial-{n}" for n in range(workers)]
        self.running: dict[int, tuple[str, Path]] = {}

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        while self.running:
            self._wait()

    def begin(self, name: str, work: Callable[[Path], dict[str, Any]]) -> None:
        """Does it in a fork, as soon as one is free. Raises RuntimeError if an earlier one ended in an error."""
        if not self.free:
            self._wait()
        place = self.free.pop()
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if child := os.fork():
            self.running[child] = name, place
            return
        code = 1
        try:
            _found(place).write_text(json.dumps(work(place)))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def _wait(self) -> None:
        child, status = os.wait()
        name, place = self.running.pop(child)
        self.free.append(place)
        if status:
            raise RuntimeError(f"{name}: not the run but its trial ended in an error")
        self.done(name, json.loads(_found(place).read_text()))


def _found(place: Path) -> Path:
    return place.with_suffix(".json")
