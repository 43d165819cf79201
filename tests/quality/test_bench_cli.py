"""``python -m benchmarks.quality``: a row through its own process, and one line for a mistake."""

import dataclasses
import io
import json

import pytest
from readable import save_teacher, save_texts
from typer.testing import CliRunner

from benchmarks.quality import worker
from benchmarks.quality.__main__ import app
from benchmarks.quality.bench import Bench
from benchmarks.quality.records import read_record
from benchmarks.quality.rows import Budget, RowSpec


def call(*arguments, code: int = 0):
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    save_teacher(folder / "teacher")
    save_texts(folder / "texts", characters=600)
    return folder


def options(places):
    data = ["--data", places / "texts", "--eval-data", places / "texts", "--teacher", places / "teacher"]
    sizes = ["--stage1-steps", 1, "--stage2-steps", 1, "--batch-size", 1, "--seq-len", 32, "--eval-length", 100]
    return [*data, *sizes, "--eval-documents", 2, "--device", "cpu", "--out", places / "out", "--work", places / "work"]


def test_rows_run_in_processes_of_their_own_and_only_once(places, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # threads that share the cores with the tests wait for each other
    shown = call("run", "plain", "--no-controls", "--measures", "loss,kl", *options(places)).output
    assert "0 rows are finished, 1 are to run, 1 at a time" in shown and "plain.s0: finished in" in shown
    record = read_record(places / "out" / "quick.jsonl", "plain.s0")
    assert record["measures"].keys() == {"loss", "kl"} and record["settings"]["budget"]["stage1_steps"] == 1
    again = call("run", "plain", "--no-controls", "--measures", "loss,kl", *options(places)).output
    assert "1 rows are finished, 0 are to run" in again


def test_a_worker_says_why_a_row_failed_and_goes_on(places, monkeypatch):
    budget = Budget(name="quick", stage1_steps=1, stage2_steps=1, batch_size=1, sequence_length=32)
    plan = Bench(
        teacher=str(places / "teacher"), data=[str(places / "texts")], eval_data=[str(places / "texts")], budget=budget,
        out=places / "worker", work=places / "worker-work", measures=["length"], eval_length=100, long_length=5000,
    )  # fmt: skip
    teacher = RowSpec(name="teacher", preset="teacher", stage1=False, stage2=False)
    jobs = [{"bench": json.loads(bench.to_json()), "row": dataclasses.asdict(teacher)} for bench in (
        plan, dataclasses.replace(plan, long_length=150))]  # fmt: skip
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(json.dumps(job) + "\n" for job in jobs)))
    answers = io.StringIO()
    monkeypatch.setattr("sys.stdout", answers)
    worker.main()
    failed, finished = map(json.loads, answers.getvalue().splitlines())
    assert failed["row"] == "teacher.s0" and failed["fate"] == "failed"
    assert failed["message"].startswith("ValueError: eval data: the longest document has")
    assert finished == {"row": "teacher.s0", "fate": "finished", "message": ""}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "presets"], "--data and --eval-data are needed"),
        (["run", "presets", "--budget", "huge", "DATA"], "--budget is 'huge', wanted quick or full"),
        (["run", "presets", "--seeds", "x", "DATA"], "--seeds is 'x', wanted numbers such as 0,1,2"),
        (["run", "presets", "--gpus", "9", "DATA"], "--gpus is 9, but 0 CUDA devices are here"),
        (["run", "nonsense", "DATA"], "no table or row 'nonsense'"),
        (["run", "softmax", "DATA"], "which layers save most KL is not measured yet"),
        (["run", "presets", "--measures", "tasks", "DATA"], "tasks needs a file of requests (--requests)"),
        (["mqar", "--mixers", "mamba"], "--mixers: no mamba; known are attention, lizard, gla, window"),
        (["docs", "--out", "/nowhere"], "--out '/nowhere' is not there"),
    ],
)
def test_mistakes_are_one_line(places, arguments, message):
    given = [part for a in arguments for part in (options(places) if a == "DATA" else [a])]
    lines = call(*given, code=2).stderr.strip().splitlines()
    assert message in lines[-1]


def test_list_shows_every_table():
    shown = call("list").output
    for name in (
        "presets",
        "gates",
        "softmax-12.5-uniform",
        "A13-all-keys",
        "recommended-passkeys",
        "gate-none: no decay",
    ):
        assert name in shown
