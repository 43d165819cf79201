"""Which files are changed, in which shares, and which tests are asked about each."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from benchmarks.mutants.changes import Change, changes, compiles

ROOT = Path(__file__).resolve().parents[2]

# An area: its share of a sample of 100, the files (patterns from the root), the folders of tests that are asked first
# and those that are asked about what these let pass.
AREAS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "ops: PyTorch": (
        24,
        ("lizard_ops/*.py", "lizard_ops/common/*.py", "lizard_ops/*_*/*.py", "lizard_ops/rotary/*.py"),
        ("tests/ops",),
        ("tests/layers", "tests/models/model"),
    ),
    "ops: kernels and their callers": (
        24,
        ("lizard_ops/*/triton/*.py", "lizard_ops/tiles/*.py"),
        ("tests/ops",),
        ("tests/layers", "tests/models/model"),
    ),
    "layers": (12, ("lizard_layers/**/*.py",), ("tests/layers",), ("tests/models",)),
    "cache, modelling": (
        20,
        ("lizard_models/model/*.py",),
        ("tests/models/model",),
        ("tests/models",),
    ),
    "text": (8, ("lizard_models/text/*.py",), ("tests/models/text",), ("tests/models",)),
    "distill": (
        12,
        ("lizard_models/distill/*.py",),
        ("tests/models/distill",),
        ("tests/models",),
    ),
}
# What holds no behaviour that a test on a CPU could see: command lines of speed, and tables of it.
LEFT_OUT = frozenset({"lizard_ops/tuning.py", "lizard_models/distill/cuda_graphs.py"})

# Words in the names of the test files that take longest: asked last.
SLOW = ("compil", "graphs", "export", "pickles", "fuzz", "parallel", "cli", "users", "ecosystem")


def files_of(area: str) -> list[str]:
    found = {path.relative_to(ROOT).as_posix() for pattern in AREAS[area][1] for path in ROOT.glob(pattern)}
    return sorted(found - LEFT_OUT)


def parts_of(asked: Iterable[str]) -> dict[str, range]:
    """File to the lines of it that may be changed, of ``FILE`` or ``FILE:FIRST-LAST``.

    Raises:
        ValueError: a file of no area, one that is named twice, or lines that are none.
    """
    known = {file for area in AREAS for file in files_of(area)}
    parts = {}
    for part in asked:
        file, _, lines = part.partition(":")
        if file not in known:
            raise ValueError(f"files: got {file!r}, wanted a file of {', '.join(AREAS)}, from the project's root")
        if file in parts:
            raise ValueError(f"files: got {file!r} twice, wanted each file once")
        if lines and not re.fullmatch(r"[1-9]\d*-[1-9]\d*", lines):
            raise ValueError(f"files: got {part!r}, wanted FILE or FILE:FIRST-LAST")
        first, last = map(int, lines.split("-")) if lines else (1, 10**9)
        parts[file] = range(first, last + 1)
    return parts


def sample(count: int, seed: int, parts: Mapping[str, range] | None = None) -> dict[str, list[Change]]:
    """``count`` changes, spread over the areas by their shares, and over the lines of each: at most one a line.

    parts: the files, and lines of them, that may be changed, and only areas that have one; None: all.

    Raises:
        ValueError: an area holds fewer lines that can be changed than its share asks for.
    """
    files = {area: [f for f in files_of(area) if parts is None or f in parts] for area in AREAS}
    total = sum(share for area, (share, *_) in AREAS.items() if files[area])
    drawn: dict[str, list[Change]] = {}
    for area, (share, *_) in AREAS.items():
        generator = random.Random(f"{seed} {area}")
        lines: dict[tuple[str, int], list[Change]] = {}
        texts = {file: (ROOT / file).read_text() for file in files[area]}
        for file, text in texts.items():
            for change in changes(file, text):
                if parts is None or change.line in parts[file]:
                    lines.setdefault((file, change.line), []).append(change)
        wanted = round(count * share / total) if texts else 0
        if wanted > len(lines):
            raise ValueError(f"count: {count} asks for {wanted} lines of {area}, which has {len(lines)}")
        drawn[area] = []
        places = sorted(lines)
        generator.shuffle(places)
        for place in places:
            here = generator.choice(lines[place])
            if len(drawn[area]) < wanted and compiles(here.apply(texts[here.file])):
                drawn[area].append(here)
    return drawn


def asked_about(area: str, file: str, kills: Mapping[str, int]) -> tuple[list[str], list[str]]:
    """The test files asked first and later: those that share a word with the file's path, then the quick, then by
    ``kills``."""
    words = set(re.split(r"[/_.]", file)) - {"py", "lizard", "ops", "models", "model", "op", "attn", "common"}

    def rank(test: str) -> tuple[bool, bool, int, str]:
        slow = any(word in test for word in SLOW)
        return words.isdisjoint(re.split(r"[/_.]", test)), slow, -kills.get(test, 0), test

    first, later = (sorted(all_tests(folders), key=rank) for folders in AREAS[area][2:])
    return first, [test for test in later if test not in first]


def all_tests(folders: Iterable[str]) -> list[str]:
    found: list[str] = []
    for name in folders:
        path = ROOT / name
        inside = [path] if path.is_file() else sorted(path.rglob("test_*.py"))
        found += [test.relative_to(ROOT).as_posix() for test in inside]
    return found
