"""Stage 3: stage 2 gone on with on longer rows, with everything that holds of the stages before it."""

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
import torch.nn.functional as F
from cli_calls import call, error, few_steps
from readable import save_teacher, save_texts
from safetensors.torch import load_file
from tiny import teacher, tokens
from training import Sequences, arguments, fresh, moved, recipes, snapshot

from lizard_models import LizardConfig, Stage3Config
from lizard_models.distill import stage1, stage2, train_stage2, train_stage3
from lizard_models.model.layer_configs import lizard_config
from lizard_models.runs import linearize_run
from lizard_models.runs.cost import disk_needed, run_cost

STEPS = few_steps(1, 1)
LONGER = ["--stage3-steps", "2", "--set", "stage3.sequence_length=128", "--set", "attention.window=16"]
LENGTH = 96  # of rows of stage 3, twice those of stages 1 and 2


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_teacher(folder / "teacher")
    save_texts(folder / "texts")
    return folder


@pytest.fixture
def command(world, tmp_path):
    return ["linearize", world / "teacher", "--data", world / "texts", *STEPS, *LONGER, "--out", tmp_path / "out"]


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def fail(*args, **kwargs):
    pytest.fail("trained again")


class Longer(Sequences):
    def __init__(self, count: int) -> None:
        super().__init__(count)
        self.rows = tokens(count, LENGTH, seed=5)


@pytest.mark.parametrize("trained", ["lora", "full"])
def test_it_learns_from_the_teacher_and_not_from_what_stage_2_has_left(tmp_path, trained):
    """Its first loss is that of two models apart: the teacher, and the student that stage 2 alone gives."""
    rates = {"learning_rate": 1e-3, "new_learning_rate": 2e-3, "gate_learning_rate": 3e-3}
    short = {"epochs": None, "max_steps": 2, "batch_size": 2, "sequence_length": LENGTH}
    recipe = dataclasses.replace(recipes(fresh(), steps=2)[1], trained=trained)
    third = Stage3Config(**short, **rates).after(recipe)
    assert (third.trained, third.lora_targets, third.kl_weight) == (trained, recipe.lora_targets, recipe.kl_weight)
    assert (third.max_steps, third.sequence_length, third.gate_learning_rate) == (2, LENGTH, 3e-3)

    alone, _ = train_stage2(fresh(), Sequences(), arguments(tmp_path / "alone"), recipe)
    rows, found = Longer(2), {}

    def then(tuning, result):
        found["learned"] = {name: p.clone() for name, p in tuning.learned().items()}
        found["stage3"] = train_stage3(tuning, rows, arguments(tmp_path / "b" / "stage3"), third)
        found["moved"] = {name for name, p in tuning.learned().items() if not torch.equal(p, found["learned"][name])}

    model, second = train_stage2(fresh(), Sequences(), arguments(tmp_path / "b" / "stage2"), recipe, then)
    with torch.no_grad():
        logits, wanted = (m(rows.rows).logits[:, :-1].log_softmax(-1) for m in (alone, teacher()))
    divergence = F.kl_div(logits, wanted, log_target=True, reduction="none").sum(-1).mean().item()
    losses = [loss for _, loss in found["stage3"].losses]
    assert len(losses) == 2 and losses[0] == pytest.approx(divergence, rel=1e-3) and losses[-1] < losses[0]
    assert second.steps == 2 and found["moved"] == found["learned"].keys()  # the same numbers, all of them
    assert moved(snapshot(alone), model) == moved(snapshot(fresh()), model)
    assert not any(p.requires_grad for p in model.parameters()) and type(model) is type(alone)


def test_a_run_stopped_in_it_goes_on_and_its_recipe_is_held(command, tmp_path, world, monkeypatch):
    whole = [*command[:-1], tmp_path / "whole"]
    measured = ["--eval-data", world / "texts", "--eval-length", "150", "--eval-documents", "1"]
    call(*whole, *measured)
    plain = stage2.LanguageModelling.forward

    def interrupted(self, input_ids, **kwargs):
        if input_ids.shape[1] == 128:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, input_ids, **kwargs)

    with monkeypatch.context() as stopped:  # before it: another recipe of it is one to go on with
        stopped.setattr(linearize_run, "train_stage3", stop)
        error(*command, "--set", "stage3.learning_rate=1e-3", code=130)
        output = call(*command, "--resume", code=130).output
        assert "stage 3 has another recipe than before; it has not begun" in output
        without = [*command[: command.index("--stage3-steps")], *LONGER[4:], "--out", tmp_path / "out"]
        shutil.copytree(tmp_path / "out.training", tmp_path / "without.training")
        call(*without[:-1], tmp_path / "without", "--resume")  # left out after all
    with monkeypatch.context() as stopped:
        stopped.setattr(stage1.AttentionTransfer, "forward", fail)
        stopped.setattr(stage2.LanguageModelling, "forward", interrupted)
        line = error(*command, "--resume", code=143)
        assert line.startswith("stage 3, longer rows stopped at step 1 of 2")
        line = error(*command, "--resume", "--set", "stage3.learning_rate=1e-3")
        assert "has begun stage 3 with another recipe" in line and line.endswith("trained before it is kept")
        assert "out.training/stage3'" in line and "out.training/stage2'" not in line
        assert "has begun stage 3 with another recipe" in error(*without, "--resume")
        both = error(*command, "--resume", "--set", "stage2.learning_rate=2e-3")
        assert "has begun stage 2 with another recipe" in both
        assert "out.training/stage2'" in both and "out.training/stage3'" in both
    work = tmp_path / "out.training"
    other = next((work / "stage2").glob("checkpoint-1")) / "trained.safetensors"
    assert load_file(other).keys() == load_file(next((work / "stage3").glob("checkpoint-1")) / other.name).keys()
    output = call(*command, "--resume").output
    assert "skipped, trained before: stage2, 1 steps" in output and "stage3 goes on from step 1 of 2" in output
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)

    record = json.loads((tmp_path / "whole" / "training.json").read_text())
    assert list(record["stages"]) == ["stage1", "stage2", "stage3"] == [s for s in record["asked"] if s != "stage0"]
    rows = json.loads((tmp_path / "whole" / "evaluation.json").read_text())["rows"]
    assert [row["name"] for row in rows][-3:] == ["after stage 1", "after stage 2", "after stage 3"]
    assert "| stage 3, longer rows | 1 of 2 |" in (tmp_path / "whole" / "run.md").read_text()
    assert "- stage3: 2 steps of 1 x 128 tokens" in (tmp_path / "whole" / "README.md").read_text()
    told = "trained: stage1 1 steps of 2 x 64 tokens, stage2 1 steps of 2 x 64 tokens, stage3 2 steps of 1 x 128 tokens"
    assert told in " ".join(call("info", tmp_path / "whole").output.split())

    monkeypatch.setattr(linearize_run, "load_teacher", fail)
    assert "finished before" in call(*command, "--resume", "auto").output
    assert "exists already" in error(*without, "--resume", "auto")  # a model with stage 3 is not one without
    assert "finished before" in call(*without[:-1], tmp_path / "without", "--resume", "auto").output
    again = [
        *without[:-1],
        tmp_path / "without",
        "--stage3-steps",
        "50",
        "--resume",
        "auto",
    ]  # of the same configuration
    assert "exists already" in error(*again)


def test_after_another_stage_2_it_does_not_go_on(command, tmp_path, monkeypatch):
    """As where a stage 2 was deleted, trained again by other means, and stage 3 forgotten."""
    with monkeypatch.context() as stopped:
        stopped.setattr(linearize_run, "refuse_broken", stop)
        error(*command, code=130)
    work = tmp_path / "out.training"
    shutil.rmtree(work / "stage2")
    monkeypatch.setattr(torch, "manual_seed", lambda seed: torch.default_generator.manual_seed(seed + 1))
    line = error(*command, "--resume")
    assert f"{work / 'stage3'} is of a run on another model" in line


def test_it_follows_a_stage_2_after_a_stage_1_of_elsewhere(command, tmp_path, monkeypatch):
    first = [*command[: command.index("--stage3-steps")], *LONGER[4:], "--stage2-steps", "0", "--out"]
    call(*first, tmp_path / "first")
    steps = LizardConfig.preset("plain").stage2.max_steps  # the same configuration, but asked for
    asked = [*first[:-2], steps, "--out", tmp_path / "first", "--resume", "auto"]
    assert "exists already" in error(*asked)  # a model without stage 2 is not one with it
    call(*command)
    monkeypatch.setattr(stage1.AttentionTransfer, "forward", fail)
    call(*command[:-1], tmp_path / "second", "--from", tmp_path / "first")
    found, wanted = (load_file(tmp_path / name / "model.safetensors") for name in ("second", "out"))
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert "has had stage1, stage2, stage3" in error(*command[:-1], tmp_path / "third", "--from", tmp_path / "second")


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--set", "stage3.batch_size=3", "--micro-batch-size", "2"], "batch_size=3 is not a multiple"),
        (
            ["--set", "stage3.sequence_length=1048576"],
            "fewer than one sequence of stage3.sequence_length=1048576; give more text",
        ),
        (["--set", "stage3.betas=[2, 3]"], "betas"),
        (["--stage2-steps", "0"], "it goes on with what stage 2 trains, and stage 2 is left out"),
        (["--stage3-steps", "0"], "--stage3-steps: stage 3 is left out, and --set changes its recipe"),
    ],
)
def test_its_mistakes_are_seen_before_stage_1(command, tmp_path, monkeypatch, more, line):
    monkeypatch.setattr(stage1.AttentionTransfer, "forward", fail)
    assert line in error(*command, *more)
    assert list(tmp_path.iterdir()) == []


def test_the_estimate_counts_it():
    """A token of longer rows costs what stage 2's costs and more attention of the teacher, 2 d a position."""
    config, preset = teacher().config, LizardConfig.preset("plain", attention={"window": 8})
    preset = preset.replace(stage3={"max_steps": 7, "sequence_length": 4096, "batch_size": 2})
    assert run_cost(config, preset).stage3 is None
    cost = run_cost(config, preset, longer=True)
    second, third = cost.stage2, cost.stage3
    assert (third.steps, third.tokens) == (7, 7 * 2 * 4096)
    more = third.flop / third.tokens - second.flop / second.tokens
    width = config.num_attention_heads * config.hidden_size // config.num_attention_heads
    assert more == pytest.approx(config.num_hidden_layers * 2 * width * (4096 - preset.stage2.sequence_length))
    kept = run_cost(config, preset.replace(stage2={"sequence_length": 4096, "batch_size": 2})).stage2
    assert third.bytes == kept.bytes > second.bytes
    model = fresh()
    chosen = lizard_config(model.config)
    trained = disk_needed(model, chosen, ["stage2"]) - disk_needed(model, chosen, [])
    assert disk_needed(model, chosen, ["stage2", "stage3"]) == disk_needed(model, chosen, []) + 2 * trained
