"""A sample of the campaign of inputs, in this process; the campaign itself can fail."""

from types import SimpleNamespace

import pytest
from readable import save_teacher
from typer.testing import CliRunner

from benchmarks.faults import inputs
from benchmarks.faults.inputs import ANY, Case, InputWorld, all_cases, judge, sample
from benchmarks.faults.results import Results
from benchmarks.faults.world import Ended
from lizard_models.cli.main import app

CASES = all_cases()
SHARES = {"recipes": 30, "options": 8, "fields": 8, "files": 2, "records": 2, "encodings": 1, "folders": 3}
QUICK = [case for area, count in SHARES.items() for case in sample([c for c in CASES if c.area == area], count)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    made = object.__new__(InputWorld)
    made.folder = tmp_path_factory.mktemp("world")
    made.teacher, made.short = made.folder / "teacher", made.folder / "short"
    save_teacher(made.teacher)
    made.model = made.teacher  # no Lizard, which no command of the sample needs
    made.short.mkdir()
    (made.short / "a.txt").write_text("short")
    return made


@pytest.mark.parametrize("case", QUICK, ids=range(len(QUICK)))
def test_each_input_is_refused_by_one_line_or_taken(world, tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lizard_models.text.documents.hub_answers", lambda path="": False)
    monkeypatch.setattr("lizard_models.teachers.find.hub_answers", lambda path="": False)
    result = CliRunner().invoke(app, case.make(tmp_path, world))
    unexpected = result.exception is not None and not isinstance(result.exception, SystemExit)
    ended = Ended(1 if unexpected else result.exit_code, result.output, 0.0)
    assert judge(case, ended, tmp_path) in ("refused", "valid"), (case.name, result.output, result.exception)


def test_there_are_as_many_as_strangers_tried_and_more():
    assert len(CASES) > 1500 and len({case.area for case in CASES}) == 9


def test_what_it_is_there_to_find_is_found(tmp_path):
    case = Case("files", "x", lambda folder, world: [], r"x\.txt")
    said = {
        "refused": (2, "teacher: a\nerror: x.txt is none"),
        "unclear": (2, "error: something"),
        "traceback": (1, "Traceback (most recent call last)\nerror: x.txt"),
        "taken": (0, "saved"),
        "hangs": (-14, ""),
    }
    for outcome, (code, text) in said.items():
        assert judge(case, Ended(code, text, 0.0), tmp_path) == outcome
    assert judge(case, Ended(-6, "error: x.txt", 0.0), tmp_path) == "traceback"
    for text in ("error: x.txt\nerror: x.txt", "error: x.txt\nmore", "x.txt"):
        assert judge(case, Ended(2, text, 0.0), tmp_path) == "unclear"
    assert judge(case._replace(wanted=ANY, may_be_valid=True), Ended(0, "", 0.0), tmp_path) == "valid"
    assert judge(case._replace(wanted=None), Ended(2, "error: x.txt", 0.0), tmp_path) == "refused wrongly"
    (tmp_path / "out.training").mkdir()
    assert judge(case, Ended(*said["refused"], 0.0), tmp_path) == "left behind"


def test_the_table_counts_by_area_and_cases_are_tried_once(tmp_path):
    said = {"1": Ended(2, "error: x", 0.0), "2": Ended(0, "", 0.0), "3": Ended(-14, "", 0.0)}
    cases = [Case("a", "1", lambda *given: ["1"], "x"), Case("a", "2", lambda *given: ["2"], None),
             Case("b", "3", lambda *given: ["3"], "x")]  # fmt: skip
    tried: list[str] = []

    def run(command: list[str], *given: object) -> Ended:
        tried.append(command[0])
        return said[command[0]]

    def campaign() -> inputs.InputCampaign:
        made = object.__new__(inputs.InputCampaign)
        made.world = SimpleNamespace(folder=tmp_path, run=run)
        made.say, made.results = lambda message: None, Results(tmp_path / "found", {"campaign": "inputs"})
        return made

    campaign().go(cases[:2])
    later = campaign()
    later.go(cases)
    assert tried == ["1", "2", "3"]
    assert later.table().splitlines()[2:] == [
        "| a | 2 | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 |",
        "| b | 1 | 0 | 0 | 0 | 0 | 0 | 0 | 0 | 1 |",
        "| all | 3 | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 1 |",
    ]
    said["3"] = Ended(2, "error: x", 0.0)
    campaign().go(cases, again=True)
    assert tried == ["1", "2", "3", "3"] and campaign().table().splitlines()[-1].startswith("| all | 3 | 2 | 1 | 0")
