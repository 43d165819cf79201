"""``python -m benchmarks.mutants run --record mutants.jsonl``, then ``table``.

A test that fails with a change has killed it. Changes that no test could tell are listed with their reasons in
``equivalent.json`` and are not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from benchmarks.mutants.areas import AREAS, ROOT, all_tests, parts_of, sample
from benchmarks.mutants.campaign import Campaign, Verdict, failing_without_change, recorded
from benchmarks.mutants.changes import again

EQUIVALENT = Path(__file__).with_name("equivalent.json")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("command", choices=("run", "again", "table", "survivors"), help="again: the recorded survivors")
    parser.add_argument("--record", type=Path, default=Path("mutants.jsonl"), help="a line of JSON for each change")
    parser.add_argument("--count", type=int, default=420, help="changes in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--areas", nargs="*", default=list(AREAS), choices=list(AREAS), metavar="AREA")
    parser.add_argument("--files", nargs="*", metavar="FILE[:FIRST-LAST]", help="change only these, or lines of them")
    parser.add_argument("--tests", nargs="*", default=[], help="ask these files and folders, not those near to a file")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--limit", type=float, default=120, help="seconds that a test may take")
    parser.add_argument("--minutes", type=float, default=600, help="stop after these; a second run goes on")
    parser.add_argument(
        "--nearest", action="store_true", help="ask only the tests nearest to a file; ask the rest by again"
    )
    parser.add_argument("--trust", action="store_true", help="all tests pass as they are: do not look first")
    asked = parser.parse_args()
    if asked.command == "table":
        return print(table(recorded(asked.record)))
    if asked.command == "survivors":
        return print("\n".join(v.change.name for v in recorded(asked.record) if v.state == "survived"))
    until = time.monotonic() + 60 * asked.minutes
    if asked.command == "again":
        old = recorded(asked.record)
        alive = [v for v in old if v.state == "survived" and v.area in asked.areas and v.change.name not in reasons()]
        todo = [(v.area, change) for v in alive if (change := again(v.change, (ROOT / v.change.file).read_text()))]
        asked.record.write_text("".join(v.line() + "\n" for v in old if v not in alive))
        print(f"{len(alive) - len(todo)} survivors changed a line that is gone: not counted any more")
    else:
        drawn = sample(asked.count, asked.seed, None if asked.files is None else parts_of(asked.files))
        todo = [(area, change) for area in asked.areas for change in drawn[area]]
    if missing := [name for name in asked.tests if not all_tests([name])]:
        parser.error(f"--tests: got {' '.join(missing)}, wanted files or folders of tests, from the project's root")
    given = all_tests(asked.tests)
    folders = [folder for area in asked.areas for group in AREAS[area][2:] for folder in group]
    tests = sorted(set(given or all_tests(folders)))
    deselected = [] if asked.trust else failing_without_change(tests, asked.workers, asked.limit)
    print(f"{len(todo)} changes, {len(deselected)} tests fail without any: {' '.join(deselected)}", flush=True)
    Campaign(asked.record, asked.workers, asked.limit, deselected, asked.nearest, given).run(todo, until)
    print(table(recorded(asked.record)))


def reasons() -> dict[str, str]:
    """Change to reason, of those that no test could tell."""
    listed: dict[str, str] = json.loads(EQUIVALENT.read_text()) if EQUIVALENT.exists() else {}
    return listed


def table(verdicts: list[Verdict]) -> str:
    """By area: changes, killed, equivalent, survivors that are not, and the share killed of those that could be."""
    known = reasons()
    rows = [
        "| area | changes | killed | equivalent | survived | killed of those that can be told |",
        "|---|---|---|---|---|---|",
    ]
    for area in [*AREAS, "all"]:
        here = [v for v in verdicts if area in (v.area, "all")]
        alive = [v for v in here if v.state == "survived"]
        same = sum(v.change.name in known for v in alive)
        told = len(here) - same
        share = f"{(len(here) - len(alive)) / told:.1%}" if told else "-"
        rows.append(f"| {area} | {len(here)} | {len(here) - len(alive)} | {same} | {len(alive) - same} | {share} |")
    return "\n".join(rows)


if __name__ == "__main__":
    main()
