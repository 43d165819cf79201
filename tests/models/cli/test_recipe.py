"""``recipe`` and ``run``: a file in place of options, of which only what is missing is done."""

import json
import shutil

import pytest
import yaml
from cli_calls import call, error, few_steps
from readable import save_teacher, save_texts
from safetensors.torch import load_file

from lizard_models.distill import stage1
from lizard_models.runs import linearize_run
from lizard_models.runs.recipe_show import preset_recipe

STEPS = few_steps(2, 2)
MEASURED = ["--eval-length", "200", "--eval-documents", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    save_teacher(folder / "teacher")
    save_texts(folder / "texts")
    return folder


def options(world, out):
    texts = world / "texts"
    return [world / "teacher", "--data", texts, "--eval-data", texts, *MEASURED, *STEPS, "--out", out]


def recipe_of(world, out, **changes):
    """What --show-recipe prints, with sections changed, as a file."""
    recipe = yaml.safe_load(call("linearize", *options(world, out), "--show-recipe").stdout)
    for name, value in changes.items():
        recipe[name] = recipe[name] | value if isinstance(value, dict) else value
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def fail(*args, **kwargs):
    pytest.fail("done again")


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def test_a_preset_is_shown_and_is_valid(tmp_path):
    text = call("recipe", "show", "paper").stdout
    assert text == preset_recipe("paper") and call("recipe", "show").stdout == preset_recipe("recommended")
    (tmp_path / "paper.yaml").write_text(text)
    said = call("recipe", "validate", tmp_path / "paper.yaml").stdout
    assert said == "valid: smollm2-135m with preset paper, stage0, stage1, stage2, to my-lizard\n"
    assert error("recipe", "show", "papre").startswith("error: unknown preset 'papre', choose one of paper, ")


def test_validate_says_every_mistake(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("teacher: t\nout: o\nstage1: {seed: x}\nstage2:\n  rank: 3\n")
    result = call("recipe", "validate", path, code=2)
    assert result.stderr.splitlines() == [
        f"error: {path}:3: stage1.seed: got x, wanted a whole number",
        f"error: {path}:5: stage2.rank: unknown key, did you mean stage2.lora_rank?",
    ]
    assert result.stdout == ""
    assert error("run", path).startswith(f"error: {path}:3: stage1.seed: ") and not (tmp_path / "o").exists()
    for command in (["recipe", "validate"], ["run"]):
        none = tmp_path / "none.yaml"
        assert error(*command, none).startswith(f"error: {none}: No such file or directory")
        assert error(*command, tmp_path).startswith(f"error: {tmp_path}: Is a directory")


def test_run_does_what_is_missing_and_says_what_it_skips(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    path = recipe_of(world, out)
    with monkeypatch.context() as stopped:
        stopped.setattr(linearize_run, "train_stage2", stop)
        assert "go on with: lizard-attn" in call("run", path, code=130).stderr
    assert not out.exists()
    with monkeypatch.context() as resumed:
        resumed.setattr(stage1.AttentionTransfer, "forward", fail)
        output = " ".join(call("run", path).output.split())
    assert "skipped, measured before: teacher, window control, untrained student, after stage 1" in output
    assert "skipped, trained before: stage1, 2 steps" in output and "stage2 goes on" not in output
    assert list(json.loads((out / "training.json").read_text())["stages"]) == ["stage1", "stage2"]
    monkeypatch.setattr(linearize_run, "load_teacher", fail)
    assert call("run", path).output.startswith("finished before: ")
    assert "exists already" in error("run", recipe_of(world, out, stage2={"max_steps": 3}))


def test_run_and_linearize_are_one(world, tmp_path, monkeypatch):
    """What one has begun the other goes on with, and the numbers are the same."""
    call("linearize", *options(world, tmp_path / "whole"))
    out = tmp_path / "out"
    with monkeypatch.context() as stopped:
        stopped.setattr(linearize_run, "train_stage2", stop)
        error("linearize", *options(world, out), code=130)
    monkeypatch.setattr(stage1.AttentionTransfer, "forward", fail)
    assert "skipped, trained before: stage1" in call("run", recipe_of(world, out)).output
    whole, found = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", out))
    assert whole.keys() == found.keys() and all((whole[name] == found[name]).all() for name in whole)
    records = [json.loads((folder / "training.json").read_text()) for folder in (tmp_path / "whole", out)]
    assert records[0]["config"] == records[1]["config"]
    shutil.rmtree(out)


def test_sources_come_by_their_weights_in_every_stage(world, tmp_path, monkeypatch):
    """A file of 3000 bytes has 46 sequences of 64 tokens, so three have 138, of which 4/7, 2/7 and 1/7 are given."""
    out = tmp_path / "out"
    data = {"sources": [str(world / "texts" / f"text-{n}.txt") for n in range(3)], "weights": [4, 2, 1]}
    changes = {
        "evaluation": {"data": []},
        "attention": {"window": 16, "score_dim": 8},
        "budget": {"kept_keys": 4},
        "stage0": {"max_steps": 2, "sequence_length": 200, "label_queries": 32},
    }
    path = recipe_of(world, out, data=data, **changes)
    with monkeypatch.context() as stopped:
        stopped.setattr(linearize_run, "train_stage2", stop)
        output = " ".join(call("run", path, code=130).stdout.split())
    assert "data of stage1: 138 sequences (79, 39, 20 by weight) of 64 tokens" in output
    assert "data of stage0: 4 rows of 200 tokens" in output
    other = recipe_of(world, out, data=data | {"weights": [4, 2, 2]}, **changes)
    again = "repeat its command with the recipe that it began with, or delete "
    again += repr(f"{out}.training")
    assert error("run", other).endswith(f"{out}.training is of a run with other weights; {again}")
    output = call("run", recipe_of(world, out, data=data, **changes)).output
    assert "trained before: stage0, 2 steps" in output and "trained before: stage1, 2 steps" in output
    assert json.loads((out / "training.json").read_text())["weights"] == [4, 2, 1]
    assert "text-2.txt, by weights of 4, 2, 1" in (out / "README.md").read_text()
    assert "finished before" in call("run", path).output and "exists already" in error(
        "run", recipe_of(world, out, data=data | {"weights": [4, 2, 2]}, **changes)
    )


def test_errors_of_a_run_name_keys(world, tmp_path):
    out = tmp_path / "out"
    mistakes = [
        ({"data": {"sources": [str(tmp_path / "none.txt")]}}, "data.sources: "),
        ({"evaluation": {"length": 5000}}, "or a smaller evaluation.length"),
        ({"stage1": {"sequence_length": 50000}}, "a smaller sequence_length"),
        ({"budget": {"widen": 1, "wide_window": 32}}, "budget.widen"),
        ({"budget": {"state_mib": 0.001}}, "budget.state_mib: got 0.001, wanted more than "),
        ({"stage2": {"lora_targets": ["nope"]}}, "lora_targets: the model has no nope"),
    ]
    for changes, line in mistakes:
        assert line in error("run", recipe_of(world, out, **changes)), changes
        assert not out.exists()


def test_a_recipe_is_estimated_without_weights(world, tmp_path):
    path = recipe_of(world, tmp_path / "out")
    (tmp_path / "weightless").mkdir()
    shutil.copy(world / "teacher" / "config.json", tmp_path / "weightless")
    recipe = yaml.safe_load(path.read_text()) | {"teacher": str(tmp_path / "weightless")}
    path.write_text(yaml.safe_dump(recipe))
    shown = call("run", path, "--dry-run").output
    command = ["linearize", tmp_path / "weightless", *options(world, tmp_path / "out")[1:], "--dry-run"]
    assert "MiB" in shown and shown == call(*command).output
