"""The changes that a campaign of small faults puts into the code."""

import math
from types import SimpleNamespace

import pytest

from benchmarks.mutants import campaign
from benchmarks.mutants.areas import AREAS, ROOT, asked_about, files_of, parts_of, sample
from benchmarks.mutants.changes import again, changes, compiles

TEXT = '''"""A docstring: 1 < 2."""
import torch


def f(x: int = 3, mask=None) -> int:
    """x < 4."""
    if x < 5:
        raise ValueError(f"{x < 6}")
    y = g(x.float(), mask=mask)
    y += 7
    return y
'''


def test_each_place_of_the_code_and_none_of_its_texts():
    found = {(change.line, change.old, change.new) for change in changes("a.py", TEXT)}
    assert found == {
        (5, "3", "4"), (5, "3", "2"),
        (7, "<", "<="), (7, "<", ">="), (7, "5", "6"), (7, "5", "4"), (7, "x < 5", "True"), (7, "x < 5", "False"),
        (9, "x.float()", "x"), (9, "mask=mask", ""),
        (10, "y += 7", "pass"), (10, "7", "8"), (10, "7", "6"),
    }  # fmt: skip
    assert all(compiles(change.apply(TEXT)) for change in changes("a.py", TEXT))


def test_a_change_is_found_again_where_its_line_went():
    change = next(change for change in changes("a.py", TEXT) if change.new == "<=")
    assert change.name == "a.py::f: if x [[< -> <=]] 5:"
    moved = TEXT.replace("import torch\n", "import torch\nimport math\n")
    assert again(change, moved).apply(moved) == moved.replace("if x < 5", "if x <= 5")
    assert again(change, TEXT.replace("x < 5", "x < 8")) is None
    with pytest.raises(ValueError, match="a.py:7: holds"):
        change.apply(moved)


def test_a_sample_is_the_same_every_time_and_holds_every_area():
    drawn = sample(50, seed=3)
    assert drawn == sample(50, seed=3) and drawn.keys() == AREAS.keys()
    assert all(compiles(change.apply((ROOT / change.file).read_text())) for area in drawn.values() for change in area)
    with pytest.raises(ValueError, match="count: 1000000 asks for"):
        sample(10**6, seed=3)


def test_a_sample_can_be_of_some_files_and_lines_alone():
    file, other = "lizard_ops/key_expiry/chunk_torch.py", "lizard_layers/anchor_block.py"
    drawn = sample(10, 3, parts_of([file, f"{other}:30-60"]))
    places = [(change.file, change.line) for area in drawn.values() for change in area]
    assert {file for file, _ in places} == {file, other} and 9 <= len(places) <= 11
    assert all(30 <= line <= 60 for name, line in places if name == other)
    with pytest.raises(ValueError, match="files: got 'lizard_ops/nix.py', wanted a file of ops: PyTorch"):
        parts_of(["lizard_ops/nix.py"])
    with pytest.raises(ValueError, match="wanted FILE or FILE:FIRST-LAST"):
        parts_of([f"{other}:7"])
    with pytest.raises(ValueError, match=f"files: got '{other}' twice, wanted each file once"):
        parts_of([f"{other}:1-9", f"{other}:30-60"])


def test_the_tests_that_are_given_are_asked(tmp_path, monkeypatch):
    made = campaign.Campaign(tmp_path / "record", 1, 5, tests=["tests/test_house.py"])
    change = next(change for change in changes("a.py", TEXT) if change.new == "<=")
    (tmp_path / "a.py").write_text(TEXT)
    made.idle.put(SimpleNamespace(tree=tmp_path))
    asked = []
    monkeypatch.setattr(made, "ask", lambda worker, tests, until: asked.append(tests) or ("survived", ""))
    made.test("layers", change, math.inf)
    assert asked == [["tests/test_house.py"]] and (tmp_path / "a.py").read_text() == TEXT


def test_every_file_is_asked_about_where_its_name_says():
    assert all(files_of(area) for area in AREAS)
    first, later = asked_about("ops: PyTorch", "lizard_ops/window_attn/chunk_torch.py", {"tests/ops/test_naive.py": 9})
    assert first[:2] == ["tests/ops/test_triton_window.py", "tests/ops/test_naive.py"]
    assert later and not set(first) & set(later)
