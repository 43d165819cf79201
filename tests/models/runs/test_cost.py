"""Plans: exact parameter counts of public shapes, and estimates that follow what they are made of."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from tiny import student, teacher
from typer.testing import CliRunner

from benchmarks.quality.__main__ import app as quality
from lizard_models import LizardConfig
from lizard_models.cli.main import app
from lizard_models.runs.cost import check_run, known_shapes, run_cost
from lizard_models.runs.plan import Plan

PARAMETERS = {
    "meta-llama/Llama-3.2-1B": 1_235_814_400,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248,
    "mistralai/Mistral-7B-v0.1": 7_241_732_096,
}


def test_public_shapes_have_their_number_of_parameters():
    assert known_shapes().keys() == PARAMETERS.keys()
    for name, config in known_shapes().items():
        cost = run_cost(config, LizardConfig.preset("paper"))
        assert cost.parameters - cost.new_parameters == PARAMETERS[name]
        assert 0.9 * 20e6 < cost.stage1.tokens < 1.1 * 20e6
        weights = 2 * PARAMETERS[name]
        assert weights < cost.stage1.bytes < 3 * weights
        flop = 2 * PARAMETERS[name] * cost.stage2.tokens  # of a dense forward, embeddings counted
        assert 0.7 * 3 * flop < cost.stage2.flop < 1.3 * 3 * flop


def test_a_plan_counts_what_the_model_has():
    model = student("plain")
    preset = LizardConfig.preset("plain", attention={"window": 8})
    cost = run_cost(teacher().config, preset)
    assert cost.new_parameters == sum(p.numel() for _, p in model.lizard_parameters())
    names = dict(model.lizard_attentions()[0].lizard.named_parameters())
    assert cost.shapes == {name: tuple(p.shape) for name, p in names.items()}
    twice = preset.replace(stage1={"max_steps": 2 * preset.stage1.max_steps})
    assert run_cost(teacher().config, twice).stage1.flop == 2 * cost.stage1.flop
    assert run_cost(teacher().config, preset, checkpointing=False).stage2.flop < cost.stage2.flop
    assert run_cost(teacher().config, preset, micro_batch=1).stage1.bytes < cost.stage1.bytes
    assert cost.stage1.seconds(100.0) == pytest.approx(2 * cost.stage1.seconds(100.0, devices=2))
    assert dataclasses.asdict(cost)["stage1"]["steps"] == preset.stage1.max_steps
    full = run_cost(teacher().config, preset.replace(stage2={"trained": "full", "lora_targets": ["q_proj"]}))
    assert full.adapters == 3 * 64 * 64


def test_what_a_cpu_takes_is_told_where_there_is_no_gpu(tmp_path, monkeypatch):
    teacher().config.save_pretrained(tmp_path / "teacher")
    many = {stage: {"max_steps": 10**7, "epochs": None} for stage in ("stage0", "stage1", "stage2")}
    cost = run_cost(teacher().config, LizardConfig.preset("recommended", **many), checkpointing=False)
    first, second, third = (stage.flop / 0.03e12 / 3600 for stage in (cost.stage0, cost.stage1, cost.stage2))
    command = ["linearize", str(tmp_path / "teacher"), "--out", str(tmp_path / "never"), "--dry-run"]
    steps = [word for stage in "012" for word in (f"--stage{stage}-steps", f"{10**7}")]

    def told(*more, gpu=False):
        monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
        return " ".join(CliRunner().invoke(app, [*command, *steps, *more]).output.split())

    every = told()
    assert f"stage 0 {first:,.1f} h, stage 1 {second:,.1f} h, stage 2 {third:,.1f} h; a GPU, fewer steps" in every
    assert "or preset plain, which has no stage 0, take less" in every and min(first, second, third) > 1
    assert f"(two cores, float32): stage 1 {second:,.1f} h; a GPU" in told("--stage0-steps", "0", "--stage2-steps", "0")
    assert "on a CPU" not in told(gpu=True) and "on a CPU" in told("--device", "cpu", gpu=True)
    said: list[str] = []
    lizard = LizardConfig.preset("recommended", **many)
    plan, model = Plan(teacher="t", config=lizard, out=tmp_path / "never", data=["text"]), student("recommended")
    for config, device in (LizardConfig.preset("plain"), "cpu"), (lizard, "cuda"), (lizard, "cpu"):
        model.config.lizard = config.to_dict()
        check_run(plan, model, ["stage1"], device, said.append)
    assert len(said) == 1 and said[0].startswith("note: on a CPU, at 0.03 TFLOP/s (two cores, float32): stage 1 ")


def test_dry_runs_show_the_plan_and_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lizard_models.teachers.find.hub_answers", lambda *arguments: False)
    out = tmp_path / "never"
    command = ["linearize", "meta-llama/Llama-3.2-1B", "--preset", "paper", "--out", str(out), "--dry-run"]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    assert "16 layers linearized" in shown.output and "feature_maps" in shown.output and not out.exists()
    plans = CliRunner().invoke(quality, ["dry-run", "--devices", "8"])
    assert plans.exit_code == 0 and all(name in plans.output for name in PARAMETERS)
    unknown = CliRunner().invoke(quality, ["dry-run", "nobody/nothing"])
    assert unknown.exit_code == 2


def test_the_page_shows_what_the_largest_plan_says(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("lizard_models.teachers.find.hub_answers", lambda *arguments: False)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    command, shown = re.search(
        r"    lizard-attn (linearize \S*Llama-3-8B (?:.*\n)+?.* --dry-run .*)\n\n.*\n\n((?:    .*\n)+)", page
    ).groups()
    said = CliRunner().invoke(app, shlex.split(command.replace("\\\n", " ")))
    plain = {" ".join(line.split()) for line in re.sub("[│┃]", "|", said.output).splitlines()}
    wanted = [" ".join(line.split()) for line in shown.splitlines()]
    assert said.exit_code == 0 and len(wanted) > 8 and [line for line in wanted if line not in plain] == []
