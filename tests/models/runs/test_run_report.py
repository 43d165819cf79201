"""The report of a run: what it says is what its log says, whatever is in there."""

import errno
import json
import os
import re
from xml.etree import ElementTree

import pytest
from cli_calls import call, error

from lizard_models.distill.divergence import Diverged
from lizard_models.files.folders import damaged, write_sums
from lizard_models.runs import run_report
from lizard_models.runs.run_log import read_log
from lizard_models.runs.run_plot import draw_stage
from lizard_models.runs.run_report import report_stop, write_run_report

TITLE = "stage 1, attention approximation"


def entry(step, loss, **more):
    return {"stage": TITLE, "time": "t", "step": step, "loss": loss, "grad_norm": 2.0, "learning_rates": [1e-3, 1e-2],
            "tokens_per_second": 100.0 * step, "resident_bytes": 2**30, "seconds": 2.0 * step, **more}  # fmt: skip


def reading(step, error, memory=((10.0, 30.0), (5.0, 500.0))):
    return {"stage": TITLE, "event": "attention", "step": step, "layers": [0, 2], "memory": memory, "error": error,
            "saturated": [0.5, None], "linear_share": [[0.25, 0.75], []]}  # fmt: skip


LINES = [
    {"stage": TITLE, "time": "t", "event": "began", "step": 0, "steps": 6, "processes": 1},
    reading(0, [0.5, 0.25]),
    entry(1, 4.0),
    entry(2, 2.0, model_flops_use=0.25),
    entry(3, 9.0),
    {"stage": TITLE, "time": "t", "event": "rolled back", "step": 3, "loss": 9.0, "to": "checkpoint-2"},
    entry(3, 1.0),
    reading(3, [0.125, 0.0625]),
    entry(4, 1.5),
    {"stage": "run", "time": "t", "event": "stopped", "why": "a | b\nc"},
]


def logged(folder, lines=LINES, more=""):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + more)
    return folder


def cells(text, start):
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split(" | ")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_run_report(logged(tmp_path_factory.mktemp("run") / "out"))


def test_tables_say_what_the_log_says(files):
    assert [path.name for path in files] == ["run-stage-1.svg", "run.md"]
    text = files[1].read_text()
    assert "State: stopped: a | b\nc." in text
    # Of step 3 the second loss counts; medians are of what counts.
    assert cells(text, "stage 1") == [TITLE, "4 of 6", "4", "1", "1.5", "2", "250", "25.0%", "1.00 GiB", "8"]
    assert cells(text, "0 ") == ["0", "0.5000", "0.1250", "20.0", "10.0 to 30.0", "50.0%", "50.0%", "25.0% to 75.0%"]
    assert cells(text, "2 ") == ["2", "0.2500", "0.0625", "252.5", "5.0 to 500.0", "", "", ""]
    assert "| t | 3 | rolled back | loss 9, to checkpoint-2 |" in text


def test_plots_are_drawn_from_every_entry_and_the_same_again(files):
    svg = files[0]
    assert draw_stage(*read_log(svg.with_name("log.jsonl")).stages) == svg.read_text()
    root = ElementTree.fromstring(svg.read_text())
    said = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    panels = ["loss", "gradient norm, before clipping", "learning rates", "tokens per second", "model-flops use (%)",
              "memory of the main process (MiB)", "relative error of the attention, by layer"]  # fmt: skip
    assert set(panels) <= set(said) and said.count("step") == 10
    curve = next(
        p.get("d") for p in root.iter("{http://www.w3.org/2000/svg}path") if "stroke: #1f77b4" in (p.get("style") or "")
    )
    assert len(re.findall("M", curve)) == 2 and len(re.findall("[ML]", curve)) == 5  # a gap where it went back


def test_few_entries_are_not_drawn(tmp_path):
    assert [path.name for path in write_run_report(logged(tmp_path / "out", LINES[:5]))] == ["run.md"]
    assert "State: running, or killed." in (tmp_path / "out" / "run.md").read_text()


READING = {"memory": [5], "saturated": [1], "linear_share": [[1]], "error": [1]}
ODD = [
    *("{", "5", "[]", '"a"', "null", "[" * 5000, "\x00\ufffd"),
    *('{"stage": 5, "step": 1}', '{"stage": "s", "step": true, "loss": 1}', '{"stage": "s", "step": 1}'),
    *('{"stage": "s", "step": 1, "loss": "x"}', '{"stage": "s", "step": 1, "loss": NaN}'),
    *(json.dumps({"stage": "s", "step": 1, "event": event}) for event in ("attention", {"a": 1}, 5)),
    *(
        json.dumps({"stage": "s", "step": 1, "event": "attention", "layers": n, **READING})
        for n in ([1], [], [1, 2], 5)
    ),
]


def test_lines_that_are_none_are_counted(tmp_path):
    write_run_report(logged(tmp_path / "out", LINES[:5], more="\n".join(ODD)))
    text = (tmp_path / "out" / "run.md").read_text()
    assert f"{len(ODD)} lines of the log cannot be read" in text and cells(text, "stage 1")[2] == "4"
    odd = {"stage": "s", "step": 1, "loss": 1.0, "learning_rates": ["a"], "grad_norm": [], "seconds": None}
    event = {"stage": "s", "step": 2, "event": "a", "steps": "many"}
    log = logged(tmp_path / "odd", [odd, *({**odd, "step": n} for n in (2, 3, 4, 2**70)), event])
    assert len(write_run_report(log)) == 2 and read_log(log / "log.jsonl").unread == 0


def test_the_command_keeps_sums_right_and_finds_the_work(tmp_path):
    out = logged(tmp_path / "out", LINES[:5])
    (out / "training.json").write_text("{}")
    (out / "model").write_text("1")
    write_sums(out)
    assert f"written: {out / 'run.md'}" in call("report", out).output
    assert damaged(out) == [] and "State: finished" in (out / "run.md").read_text()
    (out / "model").write_text("2")
    call("report", out)
    assert damaged(out) == ["model"]  # what else is wrong stays wrong
    logged(tmp_path / "other.training", LINES[:5])
    call("report", tmp_path / "other")
    assert (tmp_path / "other.training" / "run.md").is_file()


@pytest.mark.parametrize("name", ["", "nowhere", "file", "empty", "nothing", "."])
def test_folders_of_no_run_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("1")
    logged(tmp_path / "empty", [])
    (tmp_path / "nothing").mkdir()
    assert error("report", name).startswith("error: report: ")


def test_a_stop_is_logged_and_reported_as_far_as_the_disk_lets_it(tmp_path, monkeypatch):
    said = []
    report_stop(tmp_path, Diverged("why"), said.append)
    assert said == [] and list(tmp_path.iterdir()) == []  # nothing was logged
    report_stop(logged(tmp_path / "out", LINES[:5]), Diverged("the loss\nran away"), said.append)
    assert said == [f"report: {tmp_path / 'out' / 'run.md'}"]
    assert "State: stopped: the loss ran away." in (tmp_path / "out" / "run.md").read_text()

    def full(path, text):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_report, "write_whole", full)
    report_stop(tmp_path / "out", KeyboardInterrupt(), said.append)
    assert said[1:] == ["note: there is no report, its file cannot be written (No space left on device)"]
    assert read_log(tmp_path / "out" / "log.jsonl").stopped == "stopped by a signal"

    def half(*given):
        raise AttributeError("matplotlib has no attribute get_data_path")

    monkeypatch.setattr(run_report, "write_run_report", half)  # as where a signal came while matplotlib was imported
    report_stop(tmp_path / "out", KeyboardInterrupt(), said.append)
    assert said[2:] == [
        "note: there is no report (AttributeError: matplotlib has no attribute get_data_path); "
        f"lizard-attn report {tmp_path / 'out'} writes it"
    ]
