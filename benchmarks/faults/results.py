"""What a campaign found, a line of JSON for each case, so that a later run of it goes on where one ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class Results:
    """Results by case, in the order in which cases were first tried; of a case tried again the last one."""

    def __init__(self, path: Path | None, campaign: dict[str, Any]) -> None:
        """path: the file, gone on with if it is there, None for results in memory alone. campaign: what makes cases of
        one name the same case; its first line. A line that a kill has cut is left out.

        Raises ValueError for a file of another campaign.
        """
        self.path, self.found = path, dict[str, dict[str, Any]]()
        self.campaign = campaign = json.loads(json.dumps(campaign))
        if path is None:
            return
        whole = b"".join(line for line in _lines(path) if line.endswith(b"\n"))
        if not whole:
            whole = (json.dumps({"campaign": campaign}) + "\n").encode()
        path.write_bytes(whole)
        first, *rest = (json.loads(line) for line in whole.splitlines())
        if first != {"campaign": campaign}:
            raise ValueError(f"{path} is of another campaign: {first}, wanted {campaign}; give another file")
        for line in rest:
            self.found[line.pop("case")] = line

    def add(self, case: str, found: dict[str, Any]) -> None:
        """Keeps the result of a case, in the file at once."""
        self.found[case] = found
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"case": case, **found}) + "\n")


def differing(results: Results, path: Path) -> tuple[int, dict[str, str]]:
    """How many cases a file of results has too, and the outcomes of those whose outcome is another in it.

    Raises ValueError if the file is missing, or of another campaign.
    """
    if not path.is_file():
        raise ValueError(f"there are no results to compare with: {path}")
    other = Results(path, results.campaign).found
    both = results.found.keys() & other.keys()
    apart = {case: (results.found[case]["outcome"], other[case]["outcome"]) for case in sorted(both)}
    return len(both), {case: f"{ours}, there {theirs}" for case, (ours, theirs) in apart.items() if ours != theirs}


def _lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.is_file() else []
