"""What costs more than another commit is found, told and let pass where its commit says so."""

import subprocess

import pytest

from benchmarks import regressions
from benchmarks.regressions import CASES, Case, announced, extract, fails, git, judged, measured, verdict

SUITE = """
import packed

class Costs:
    def setup(self, factor):
        self.factor = factor

    def track_calls(self, factor):
        return packed.calls() * factor

    def track_milliseconds(self, factor):
        return packed.milliseconds() * factor

    def time_nothing(self, factor):
        packed.calls()

    def track_broken(self, factor):
        return packed.missing

    track_calls.unit, track_milliseconds.unit, track_broken.unit = "calls", "milliseconds", "calls"
"""
PACKED = "def calls():\n    return {calls}\n\ndef milliseconds():\n    return {milliseconds}\n"
CALLS, TIME, BROKEN = (Case("costs", "Costs", f"track_{name}", (2,)) for name in ("calls", "milliseconds", "broken"))


@pytest.fixture
def checkouts(tmp_path, monkeypatch):
    """Makes the base's package and this checkout's, and gives the base's folder and that of the suites."""
    (tmp_path / "suites" / "fake_suite").mkdir(parents=True)
    (tmp_path / "suites" / "fake_suite" / "costs.py").write_text(SUITE)
    monkeypatch.setattr(regressions, "ROOT", tmp_path / "here")
    monkeypatch.setattr(regressions.measured, "__defaults__", ("fake_suite",))

    def made(base, here):
        for name, values in (("base", base), ("here", here)):
            (tmp_path / name).mkdir()
            (tmp_path / name / "packed.py").write_text(PACKED.format(**values))
        return tmp_path / "base", tmp_path / "suites"

    return made


def test_both_checkouts_are_measured_and_what_costs_more_is_found(checkouts):
    base, suites = checkouts({"calls": 5, "milliseconds": 1.0}, {"calls": 6, "milliseconds": 1.05})
    found = judged(base, [CALLS, TIME, BROKEN], suites)
    assert found[CALLS.name] == {"state": "slower", "unit": "calls", "base": [10], "here": [12]}
    assert found[TIME.name]["state"] == "same" and found[TIME.name]["here"] == [2.1] * 3
    assert found[BROKEN.name]["state"] == "broken" and "missing" in found[BROKEN.name]["error"]
    assert fails(found, []) == [CALLS.name, BROKEN.name]
    assert fails(found, ["costs.Costs.track_calls*", "*broken*"]) == [BROKEN.name]


def test_times_are_timed_and_an_import_that_fails_is_told(checkouts):
    base, suites = checkouts({"calls": 1, "milliseconds": 1}, {"calls": 1, "milliseconds": 1})
    timed = measured(base, [Case("costs", "Costs", "time_nothing", (1,))], suites)["costs.Costs.time_nothing(1)"]
    assert timed["unit"] == "milliseconds" and 0 <= timed["value"] < 50
    other = Case("nowhere", "Costs", "track_calls")
    assert "nowhere" in measured(base, [other], suites)[other.name]["error"]


def runs(base, here, unit="milliseconds"):
    return {t: [{"x": {"value": v, "unit": unit}} for v in values] for t, values in (("A", base), ("B", here))}


@pytest.mark.parametrize(
    "base, here, state",
    [
        ([1.0, 1.3, 1.1], [1.2, 1.4, 1.6], "same"),  # within what the base itself varies
        ([1.0, 1.0, 1.0], [1.05, 1.08, 1.09], "same"),  # within the margin
        ([1.0, 1.2, 1.1], [1.4, 1.5, 1.33], "slower"),
        ([1.0, 1.0, 1.0], [0.8, 0.85, 0.9], "better"),
    ],
)
def test_a_time_is_slower_where_every_run_is(base, here, state):
    assert verdict("x", runs(base, here))["state"] == state


def test_a_count_is_slower_by_one():
    assert verdict("x", runs([100], [101], "calls"))["state"] == "slower"
    assert verdict("x", runs([100], [100], "bytes"))["state"] == "same"
    assert verdict("x", runs([100], [99], "bytes"))["state"] == "better"


def test_a_time_that_seems_slower_is_measured_again(monkeypatch, tmp_path):
    asked = []

    def fake(first, second):
        def run(base, cases, suites):
            asked.append([case.method for case in cases])
            values = [first, second][len(asked) - 1]
            return {t: [{case.name: values[t] for case in cases}] for t in "AB"}

        return run

    slow = {t: {"value": v, "unit": "milliseconds"} for t, v in (("A", 1.0), ("B", 2.0))}
    even = {t: {"value": 1.0, "unit": "milliseconds"} for t in "AB"}
    for second, state in ((even, "same"), (slow, "slower")):
        asked.clear()
        monkeypatch.setattr(regressions, "in_turn", fake(slow, second))
        found = judged(tmp_path, [TIME], tmp_path)[TIME.name]
        assert found["state"] == state and found["first"]["state"] == "slower" and len(asked) == 2


def test_a_case_that_the_base_cannot_run_is_not_judged():
    found = verdict("x", {"A": [{"x": {"error": "AttributeError: no"}}], "B": [{"x": {"value": 9, "unit": "calls"}}]})
    assert found == {"state": "not in the base", "error": "AttributeError: no"} and not fails({"x": found}, [])


def test_commits_announce_what_costs_more(tmp_path):
    def commit(text, message):
        (tmp_path / "lizard_ops").mkdir(exist_ok=True)
        (tmp_path / "lizard_ops" / "a.py").write_text(text)
        git("add", "-A", root=tmp_path)
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        git(*who, "commit", "-q", "-m", message, root=tmp_path)
        return git("rev-parse", "HEAD", root=tmp_path).decode().strip()

    git("init", "-q", root=tmp_path)
    first = commit("1", "slower: before* the base")
    commit("2", "Keep a second sum\n\nslower: host.*operators(lizard,*) it is needed for the mass\nslower:\n")
    commit("3", "Do more")
    assert announced(first, tmp_path) == ["host.*operators(lizard,*)"]
    with pytest.raises(subprocess.CalledProcessError):
        announced("nothing", tmp_path)
    extract(first, tmp_path / "out", tmp_path)
    assert (tmp_path / "out" / "lizard_ops" / "a.py").read_text() == "1"


def test_the_cases_are_benchmarks_of_the_suites(monkeypatch):
    monkeypatch.syspath_prepend(str(regressions.ROOT / "benchmarks"))
    for case in CASES:
        suite = getattr(__import__(f"asv_suite.{case.module}", fromlist=["x"]), case.suite)
        assert callable(getattr(suite, case.method)) and len(case.parameters) == len(getattr(suite, "params", ()))
