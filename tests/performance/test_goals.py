"""The table of goals against files of results whose figures are known."""

import json
import shlex
from pathlib import Path

import pytest

from benchmarks.gpu.goals import RESULTS, goals, markdown, reports, text

H200, CPU = {"device": "NVIDIA H200"}, {"device": "x86_64"}


@pytest.fixture
def table(tmp_path):
    """Writes files of results and gives the goals' lines by their names."""

    def made(files):
        for name, content in files.items():
            path = tmp_path / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))
        return {goal.goal: goal for goal in goals(tmp_path)}

    return made


def report(rows, date="2026-12-01", device=H200, **arguments):
    return {"environment": {"date": date} | device, "arguments": arguments, "rows": rows}


def lengths(teacher, lizard, name="prefill_tokens_s", **more):
    """Rows of both ways with these values by length."""
    pairs = (("teacher", teacher), ("lizard", lizard))
    return [{"way": way, "length": n, name: x} | more for way, found in pairs for n, x in found.items()]


PREFILL = "prefill, 135M, batch 1: tokens/s over the teacher's"
SMALL = {"shape": "smollm2-135m", "batch": 1}


def test_a_goal_of_several_cases_is_met_only_where_all_are_measured_and_met(table):
    teacher = {1024: 10, 2048: 20, 4096: 40, 8192: 80, 16384: 160}
    whole = report(lengths(teacher, {n: 1.25 * x for n, x in teacher.items()}), **SMALL)
    found = table({"decode/a.json": whole})[PREFILL]
    assert found.state == "met" and found.found.startswith("1.25 at 1K; 1.25 at 2K")
    part = report(lengths(teacher, {1024: 11, 2048: 22}), **SMALL)
    found = table({"decode/a.json": part})[PREFILL]
    assert found.state == "not measured" and found.found.endswith("not measured: 4K, 8K, 16K")
    part["rows"][-1]["prefill_tokens_s"] = 19
    assert table({"decode/a.json": part})[PREFILL].state == "missed"


def test_teacher_and_lizard_are_compared_within_one_file_and_the_newest_counts(table):
    old = report(lengths({1024: 10}, {1024: 30}), "2026-11-01", **SMALL)
    new = report(lengths({1024: 10}, {1024: 5}), "2026-11-02T01:00:00+00:00", **SMALL)
    alone = report(lengths({}, {1024: 1000}), "2026-11-03", **SMALL)
    found = table({"decode/a.json": old, "decode/b.json": new, "decode/c.json": alone})[PREFILL]
    assert found.files == ["decode/b.json"] and found.found.startswith("0.50 at 1K;")


def test_files_of_generate_count_by_their_prompt(table):
    rows = [{"way": "teacher", "prefill_ms": 50.0}, {"way": "lizard", "prefill_ms": 20.0, "first_call_s": 16.0}]
    found = table({"decode/a.json": report(rows, **SMALL, prompt=131072, tokens=64)})
    assert found["the same at 128K"].found == "2.50" and found["the same at 128K"].state == "missed"
    assert found["generate(), 135M, batch 1: first call, s"].state == "missed"
    command = "python benchmarks/gpu/generate.py --shape smollm2-135m --batch 1 --prompt 131072 --tokens 64"
    assert found["the same at 128K"].commands == [command]


def test_other_chips_are_left_aside(table):
    files = {"decode/a.json": report(lengths({1024: 1}, {1024: 9}), device={"gpu": "NVIDIA H100"}, **SMALL)}
    assert all(goal.state == "not measured" for goal in table(files).values())


def test_shares_of_the_floor_and_their_spread(table):
    at = {"shape": "llama-3-8b", "batch": 16}
    own = {"way": "lizard", "ms_token": 5.0, "floor_ms": 4.0, "counted_gib": 20.0}
    rows = [own | {"length": n} for n in (1024, 8192, 32768, 131072)]
    rows[2] |= {"ms_token": 5.1, "floor_ms": 3.0}
    found = table({"decode/a.json": report(rows, **at)})
    share = found["generate(), 8B shape, batch 16: share of the bandwidth floor"]
    assert share.state == "missed" and share.found == "80% at 1K; 80% at 8K; 59% at 32K; 80% at 128K"
    spread = found["the same, batch 16: slowest over fastest context, 1K to 128K"]
    assert (spread.state, spread.found) == ("met", "1.020")
    assert found["generate(), 8B shape, batch 1: share of the bandwidth floor"].state == "not measured"


def test_the_floor_of_generate_is_without_the_embedding(table):
    made = report([{"way": "lizard", "ms_token": 4.0, "floor_ms": 3.0}], shape="llama-3-8b", batch=1, prompt=8192)
    made["copy_bytes_s"] = 2 * 128256 * 4096 * 1000  # it takes a millisecond
    share = table({"decode/a.json": made})["generate(), 8B shape, batch 1: share of the bandwidth floor"]
    assert share.found.startswith("50% at 8K")


def test_the_teacher_at_32k_and_where_it_runs_out_of_memory(table):
    at = {"shape": "llama-3-8b", "batch": 16}
    rows = [
        {"way": "teacher", "length": 32768, "tokens_s": 900.0},
        {"way": "teacher", "length": 65536, "failed": "out of memory"},
        {"way": "teacher", "length": 131072, "failed": "out of memory"},
        {"way": "teacher-static", "length": 32768, "tokens_s": 250.0},
        {"way": "lizard", "length": 32768, "tokens_s": 1000.0},
    ]
    found = table({"decode/a.json": report(rows, **at)})
    assert found["8B shape, batch 16, context 32K: tokens/s over the compiled teacher's"].found == "4.00"
    told = found["where the teacher runs out of memory"]
    assert (told.state, told.found) == ("met", "teacher from 64K")


def test_host_time_by_layer(table):
    rows = [
        {"shape": "llama-3-8b", "of": of, "kind": "train", "model": model, "host_us": us}
        for of, model, us in (("layer", "teacher", 10), ("layer", "lizard", 13), ("model", "lizard", 1))
    ]
    found = table({"host/a.json": report(rows)})["host time of a layer, forward and backward, over the teacher's"]
    assert found.state == "missed" and found.found == "1.30 at 8B; not measured: 135M"


def test_a_slower_kernel_misses_and_fewer_rows_are_not_measured(table):
    def kernels(forward, training, date="2026-11-29", command="kernel_times.py --graph"):
        row = {"group": "window", "name": "ours", "2048": {"forward_ms": forward, "training_ms": training}}
        return {"environment": {"gpu": "NVIDIA H200", "date": date, "command": command}, "rows": [row]}

    goal = "the tables of docs/kernels.md: time over that of 2026-11-29 and -30, the worst three"
    assert table({"kernels/h200_graph.json": kernels(1.0, 4.0)})[goal].state == "not measured"
    events = kernels(9.0, 9.0, "2026-12-02", "kernel_times.py")  # another clock
    files = {"kernels/h200_graph.json": kernels(1.0, 4.0), "kernels/events.json": events}
    assert table(files)[goal].state == "not measured"
    files["kernels/new.json"] = kernels(1.02, 4.0, "2026-12-02")
    assert table(files)[goal].state == "met"
    files["kernels/newer.json"] = kernels(1.0, 4.4, "2026-12-03")
    found = table(files)[goal]
    assert found.state == "missed" and found.found.startswith("1.10 at window, ours, 2048, training; 1.00")


def step(stage, kind, ms, batch=4, length=2048):
    time = {"failed": "out of memory"} if ms is None else {"ms": ms}
    return {"stage": stage, "batch": batch, "length": length, "kind": kind} | time


def test_training_takes_the_fastest_kind_of_each_and_names_it(table):
    rows = [
        step("teacher forward", "plain", 100.0, batch=8),
        step("stage 1", "plain", 90.0),
        step("stage 1", "graph", 70.0),
        step("teacher LoRA", "plain", 120.0),
        step("teacher LoRA", "graph", None),
        step("stage 2", "graph", 100.0),
        step("stage 2 CE", "plain", 150.0),
    ]
    found = table({"training/a.json": report(rows, shape="llama-3-8b")})
    first = found["8B shape: step of stage 1 over a teacher's forward"]
    assert first.found == "1.40 at 2K (graph beside plain); not measured: 8K"
    second = found["8B shape, 2048 tokens: the teacher's LoRA step over stage 2's"]
    assert (second.found, second.state) == ("1.20 (graph beside plain)", "met")
    alone = found["8B shape, 2048 tokens: the teacher's LoRA step over stage 2's on next tokens alone"]
    assert (alone.found, alone.state) == ("0.80 (plain beside plain)", "missed")
    assert found["8B shape, 32768 tokens: the teacher's LoRA step over stage 2's"].state == "not measured"


def test_stage_2_has_no_kind_that_the_teachers_lora_was_not_tried_in(table):
    rows = [step("teacher LoRA", "plain", 120.0), step("stage 2", "plain", 150.0), step("stage 2", "graph", 60.0)]
    goal = "8B shape, 2048 tokens: the teacher's LoRA step over stage 2's"
    assert table({"training/a.json": report(rows, shape="llama-3-8b")})[goal].found == "0.80 (plain beside plain)"
    rows.append(step("teacher LoRA", "graph", 90.0))
    assert table({"training/a.json": report(rows, shape="llama-3-8b")})[goal].found == "1.50 (graph beside graph)"


def test_a_cpu_has_goals_of_its_own(table):
    rows = lengths({1024: 2.0, 16384: 4.0, 100_000: 9.0}, {1024: 2.0, 16384: 2.0, 100_000: 2.1}, "ms_token")
    found = table({"decode/a.json": report(rows, device=CPU, **SMALL)})
    assert found["CPU, 135M: a token's time over the teacher's"].state == "met"
    assert found["CPU, 135M: slowest over fastest length to 100K"].found == "1.05"
    assert found[PREFILL].state == "not measured"


def test_the_kept_files_are_read_with_their_commands():
    table = goals(RESULTS)
    assert {goal.state for goal in table} <= {"met", "missed", "not measured"}
    for goal in table:
        assert all((RESULTS / file).is_file() for file in goal.files)
        for command in goal.commands:
            script = next(word for word in shlex.split(command) if word.endswith(".py"))
            assert (Path(__file__).parents[2] / script).is_file()
        assert (goal.state == "not measured") or goal.files
    assert len(reports(RESULTS)) >= 10
    assert text(table).count("\n") >= 2 * len(table) - len([g for g in table if not g.found])


def test_the_kept_table_is_what_the_files_show():
    """Made anew by the command at its top."""
    assert (RESULTS / "GOALS.md").read_text() == markdown(goals(RESULTS)) + "\n"
