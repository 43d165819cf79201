"""Reading and writing by length, on a tiny model: are repeated rows what as many texts are, and what is counted?"""

import argparse
import json
import sys

import lengths
import lengths_cpu
import plot_lengths
import pytest
import torch
from generate import build

from benchmarks.gpu.goals import goals
from benchmarks.gpu.roofline import Layer, decode_bytes
from lizard_models import LizardConfig, linearize


def arguments(*given):
    tiny = ["--shape", "tiny", "--device", "cpu", "--batch", "2", "--tokens", "2", "--turns", "3", "--piece", "24"]
    return [*tiny, "--layers", "1", "--lengths", "32", "80", "--static-lengths", "80", *map(str, given)]


@pytest.fixture
def call(monkeypatch, tmp_path):
    """Runs the script and gives its exit code and the file."""

    def run(*given):
        out = tmp_path / "decode" / "lengths.json"
        monkeypatch.setattr(sys, "argv", ["benchmarks/gpu/lengths.py", *arguments(*given), "--out", str(out)])
        code = lengths.main()
        return code, json.loads(out.read_text())

    return run


@pytest.fixture(scope="module")
def models():
    """The teacher, and a Lizard of another with the same weights."""
    args = argparse.Namespace(shape="tiny", layers=2, device="cpu")
    return {"teacher": build(args), "lizard": linearize(build(args), LizardConfig.preset("plain")).eval()}


@pytest.mark.parametrize("way", lengths.WAYS)
@torch.no_grad()
def test_repeated_rows_are_as_many_texts(models, way):
    model = models["lizard" if way == "lizard" else "teacher"]
    ids = torch.randint(1, 64, (1, 150), generator=torch.Generator().manual_seed(0))
    row = lengths.read(model, None, ids, 40)
    before = lengths.state_bytes(way, row, 1)
    cache, token = lengths.repeated(way, model, row, 3, 8), torch.full((3, 1), 5)
    if way == "teacher-static":
        whole = lengths.StaticCache(config=model.config, max_cache_len=158)
        model(ids.expand(3, -1), past_key_values=whole, use_cache=True)
    else:
        whole = lengths.read(model, None, ids.expand(3, -1), 40)
    for _ in range(3):
        found, wanted = (model(token, past_key_values=c, use_cache=True).logits for c in (cache, whole))
        torch.testing.assert_close(found, wanted)
    assert lengths.state_bytes(way, row, 1) == before  # the row itself has not moved


def test_rows_that_are_there_are_not_measured_again(call):
    code, first = call("--ways", "teacher")
    assert code == 0 and [(r["way"], r["length"]) for r in first["rows"]] == [("teacher", 32), ("teacher", 80)]
    code, second = call("--ways", *lengths.WAYS)
    assert code == 0 and second["rows"][:2] == first["rows"]
    assert [(r["way"], r["length"]) for r in second["rows"][2:]] == [
        ("teacher-static", 80), ("lizard", 32), ("lizard", 80)
    ]  # fmt: skip
    assert all(r["ms_token"] > 0 and r["prefill_tokens_s"] > 0 for r in second["rows"])
    assert second["commands_before"] == [first["command"]]
    with pytest.raises(ValueError, match="--out .* is of another run: tokens"):
        call("--tokens", "3")


def test_lengths_that_were_read_but_took_no_turn_are_measured_again(call, monkeypatch):
    turns, asked = lengths.in_turns, []

    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(lengths, "in_turns", stopped)
    with pytest.raises(KeyboardInterrupt):
        call("--ways", "lizard")
    monkeypatch.setattr(
        lengths, "in_turns", lambda writers, *given: asked.append(len(writers)) or turns(writers, *given)
    )
    rows = call("--ways", "lizard")[1]["rows"]
    assert asked == [2] and [r["length"] for r in rows] == [32, 80] and all(len(r["turns_ms"]) == 3 for r in rows)

    def full(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(lengths, "in_turns", full)
    rows = call("--ways", "lizard", "--lengths", "32", "48", "80")[1]["rows"]
    assert [(r["length"], r.get("failed")) for r in rows] == [(32, None), (80, None), (48, "out of memory")]


def test_where_memory_runs_out_longer_texts_are_not_tried(call, monkeypatch):
    repeated = lengths.repeated

    def small(way, model, row, rows, room):
        if way == "teacher":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return repeated(way, model, row, rows, room)

    monkeypatch.setattr(lengths, "repeated", small)
    code, report = call()
    assert code == 0 and report["rows"][0]["failed"] == "out of memory" and report["rows"][0]["counted_gib"] > 0
    assert [(r["way"], r["length"]) for r in report["rows"]] == [("teacher", 32), ("lizard", 32), ("lizard", 80)]
    assert len(call()[1]["rows"]) == 3

    def broken(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(lengths, "repeated", broken)
    code, report = call("--ways", "teacher-static")
    assert code == 1 and report["rows"][-1]["failed"] == "RuntimeError: no"


def test_each_length_from_its_start_and_a_teacher_that_reads_nothing(call, monkeypatch):
    read, parts = lengths.read, []
    monkeypatch.setattr(lengths, "read", lambda m, c, ids, piece: parts.append(ids.shape[1]) or read(m, c, ids, piece))
    _, report = call("--fresh", "--fill")
    assert parts == [32] * lengths.READS + [80] * lengths.READS
    assert all(r["first_read_s"] > 0 for r in report["rows"][2:])
    assert [r["prefill_tokens_s"] is None for r in report["rows"]] == [True, True, False, False]


def test_what_is_counted(models):
    teacher, lizard = models["teacher"], models["lizard"]
    assert lengths.weight_bytes(teacher) == sum(p.nbytes for p in teacher.parameters())  # embedding and head are one
    untied = build(argparse.Namespace(shape="llama-3-8b", layers=0, device="meta"))
    assert lengths.weight_bytes(untied) == (128256 + 1) * 4096 * 4  # the head and the last norm
    row = lengths.filled(teacher, 50)
    assert lengths.state_bytes("teacher", row, 7) == (7 * 2 * 2 * 50 * 8 * 4,) * 2  # layers, both, tokens, dim, float32
    half = lizard.bfloat16()
    row = lengths.read(half, None, torch.ones(1, 40, dtype=torch.long), 40)
    held, moved = lengths.state_bytes("lizard", row, 7)
    layer = Layer(N=7, H=2, K=1, D=8, P=128)
    wanted = ("sums, read and written", "keys and values of the window", "its gates", "anchors")
    assert moved == 2 * sum(t.value for t in decode_bytes(layer) if t.what in wanted)
    assert held == 7 * row.state_bytes()
    lizard.float()


def test_the_plot_and_the_goals_read_the_file(call, tmp_path, monkeypatch):
    _, report = call("--ways", "teacher", "lizard")
    at = {"shape": "llama-3-8b", "batch": 16}
    report["arguments"] |= at
    report["environment"]["device"] = "NVIDIA H200"
    for row in report["rows"]:
        row |= {"length": row["length"] * 1024, "tokens_s": 10.0, "peak_gib": 20.0}
    report["rows"][0]["length"], report["rows"][2]["length"] = 1024, 1024
    report["rows"][1] |= {"failed": "out of memory", "counted_gib": 150.0}
    report["memory_gib"] = 139.8
    source, out = tmp_path / "decode" / "lengths.json", tmp_path / "figure.svg"
    source.write_text(json.dumps(report))
    told = next(goal for goal in goals(tmp_path) if goal.goal == "where the teacher runs out of memory")
    assert told.found == "teacher from 80K"
    figure = plot_lengths.draw([report])
    labels = [t.get_text() for t in figure.legends[0].get_texts()]
    assert labels == ["teacher", "teacher: out of memory", "Lizard", "the GPU's memory"]
    crosses = [line for line in figure.axes[1].lines if line.get_marker() == "x"]
    assert [tuple(line.get_xydata()[0]) for line in crosses] == [(80 * 1024, 150.0)]
    monkeypatch.setattr(sys, "argv", ["plot_lengths.py", str(source), "--out", str(out)])
    plot_lengths.main()
    once = out.read_bytes()
    plot_lengths.main()
    assert once == out.read_bytes() and b"80K" in once and b"<svg" in once


def test_a_cpu_measures_teacher_and_student_in_turns(monkeypatch, tmp_path, capsys):
    out = tmp_path / "decode" / "cpu.json"
    given = [
        "--shape",
        "tiny",
        "--lengths",
        "20",
        "40",
        "--read",
        "24",
        "--seconds",
        "0",
        "--rounds",
        "2",
        "--tokens",
        "3",
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu/lengths_cpu.py", *given, "--out", str(out)])
    assert lengths_cpu.main() == 0 and "ratio" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [(r["way"], r["length"], r["filled"], r["tokens"]) for r in rows] == [
        ("teacher", 20, False, 6), ("lizard", 20, False, 6), ("teacher", 40, True, 6), ("lizard", 40, True, 6)
    ]  # fmt: skip
    assert all(0 < r["ms_token"] <= r["median_ms"] for r in rows)
    monkeypatch.setattr(sys, "argv", ["benchmarks/gpu/lengths_cpu.py", "--clock", "thread"])
    with pytest.raises(ValueError, match="--clock thread: got --threads 2, wanted 1"):
        lengths_cpu.main()
