"""Recipe files: complete, documented, the same as the command line's options, and refused by line and key."""

import dataclasses
import json
import random
import re
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import typer
import yaml
from cli_calls import call

from lizard_layers import AttentionChoices
from lizard_models import LizardConfig
from lizard_models.cli.main import app
from lizard_models.presets import PRESETS
from lizard_models.recipes import Stage0Config, Stage1Config, Stage2Config, Stage3Config
from lizard_models.runs.plan import Plan
from lizard_models.runs.recipe_file import RecipeError, read_recipe
from lizard_models.runs.recipe_keys import LEAST, keys, wanted, written
from lizard_models.runs.recipe_show import preset_recipe, show

LEAST_TEXT = "teacher: some/teacher\nout: made\n"
CHANGED = """\
# of every kind of value
teacher: some/teacher
out: "made of this"
preset: paper
data:
  sources: [books/, "no", 'it''s']
  weights: [2, 0.5, 1]
  encoding: latin-1
attention: {window: 64, positions: true, gate_init: null, num_sinks: 1, sink_spread: 2}
budget:
  kept_keys: [[8, 16], [4, 0]]
  softmax_layers:
    - 3
    - 11
stage1:
  run: false
stage2: {max_steps: 50, learning_rate: 1e-3, betas: [0.9, 0.95], seed: 1_000}
evaluation:
  data: [held-out]
  passkey_lengths: [256, 1024]
training: {dtype: bfloat16, device: cpu, report_to: [tensorboard], diverged: 5}
"""


def read(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return read_recipe(path)


def faults(text, tmp_path):
    """Line, key and the rest of every fault."""
    with pytest.raises(RecipeError) as error:
        read(text, tmp_path)
    parts = [re.fullmatch(r".*recipe\.yaml(?::(\d+))?: (.*)", fault) for fault in error.value.faults]
    return [(int(part[1] or 0), part[2]) for part in parts]


@pytest.mark.parametrize("name", PRESETS)
def test_a_shown_preset_is_that_preset(name, tmp_path):
    text = preset_recipe(name)
    plan = read(text, tmp_path)
    assert plan.config == LizardConfig.preset(name)
    assert plan.resume == "auto" and plan.data == [plan.config.stage1.dataset]
    assert show(plan) == text
    known = yaml.safe_load(text)  # others read it as we do
    config = plan.config.to_dict()
    for part, values in known.items():
        for key, value in values.items() if isinstance(values, dict) else ():
            if key in config.get(part, {}):
                assert config[part][key] == value and type(config[part][key]) is type(value), (part, key)


def test_every_field_is_a_key_and_every_key_has_a_comment():
    parts = {"": LizardConfig, "attention": AttentionChoices}
    parts |= {"stage0": Stage0Config, "stage1": Stage1Config, "stage2": Stage2Config, "stage3": Stage3Config}
    wanted_keys = {
        ("config", *part.split("."), f.name) for part, kind in parts.items() for f in dataclasses.fields(kind)
    }
    wanted_keys = {tuple(filter(None, key)) for key in wanted_keys if key[-1] not in ("dataset", *parts)}
    wanted_keys |= {(f.name,) for f in dataclasses.fields(Plan) if f.name not in ("config", "resume")}
    assert {key.target for key in keys().values()} == wanted_keys | {("preset",)}
    lines = preset_recipe("recommended").splitlines()
    given = [i for i, line in enumerate(lines) if re.match(r" *[a-z0-9_]+: ", line)]
    assert len(given) == len(keys())
    for i in given:
        assert lines[i - 1].lstrip().startswith("# ") and len(" ".join(lines[i - 4 : i])) > 30, lines[i]
    assert max(map(len, lines)) <= 100 and "``" not in "".join(lines)


OPTIONS = {
    "--data": (["a", "b/"], "data.sources", ["a", "b/"]),
    "--preset": ("paper", "preset", "paper"),
    "--set": ("attention.window=32", "attention.window", 32),
    "--kept-keys": ("64", "budget.kept_keys", 64),
    "--state-mib": ("2.5", "budget.state_mib", 2.5),
    "--softmax-layers": ("3,5", "budget.softmax_layers", [3, 5]),
    "--softmax-share": ("0.25", "budget.softmax_share", 0.25),
    "--keep-sliding": (None, "budget.keep_sliding_layers", True),
    "--widen": ("2", "budget.widen", 2),
    "--stage0-steps": ("7", "stage0.max_steps", 7),
    "--stage1-steps": ("0", "stage1.run", False),
    "--stage2-steps": ("8", "stage2.max_steps", 8),
    "--stage3-steps": ("6", "stage3.max_steps", 6),
    "--batch-size": ("3", "stage2.batch_size", 3),
    "--seq-len": ("77", "stage1.sequence_length", 77),
    "--micro-batch-size": ("2", "training.micro_batch_size", 2),
    "--gradient-checkpointing": (None, "training.gradient_checkpointing", True),
    "--fsdp": (None, "training.fsdp", True),
    "--context-parallel": ("2", "training.context_parallel", 2),
    "--cuda-graph": (None, "training.cuda_graph", True),
    "--compile": (None, "training.compile", True),
    "--seed": ("9", "stage0.seed", 9),
    "--text-field": ("body", "data.text_field", "body"),
    "--encoding": ("latin-1", "data.encoding", "latin-1"),
    "--eval-data": (["c"], "evaluation.data", ["c"]),
    "--eval-length": ("512", "evaluation.length", 512),
    "--eval-documents": ("3", "evaluation.documents", 3),
    "--passkey": ("256,512", "evaluation.passkey_lengths", [256, 512]),
    "--device": ("cpu", "training.device", "cpu"),
    "--dtype": ("bfloat16", "training.dtype", "bfloat16"),
    "--save-steps": ("11", "training.save_steps", 11),
    "--report-to": ("tensorboard,wandb", "training.report_to", ["tensorboard", "wandb"]),
    "--diverged": ("4", "training.diverged", 4.0),
    "--log-attention-every": ("20", "training.log_attention_every", 20),
    "--peak-tflops": ("400", "training.peak_tflops", 400.0),
    "--cache": ("there", "training.cache", "there"),
}
ALONE = ("--out", "--from", "--resume", "--dry-run", "--show-recipe")  # in the test, of a folder, or of no file
PAIRS = [{"--state-mib", "--kept-keys"}, {"--softmax-layers", "--softmax-share"}]


def shown(*arguments, tmp_path):
    text = call("linearize", "some/teacher", "--out", "made", *arguments, "--show-recipe").stdout
    assert show(read(text, tmp_path)) == text
    return yaml.safe_load(text)


def test_every_option_of_linearize_is_a_key(tmp_path):
    command = typer.main.get_command(app).commands["linearize"]
    options = {p.opts[0]: p for p in command.params if p.param_type_name == "option"}
    assert options.keys() == OPTIONS.keys() | set(ALONE)
    for second in (False, True):  # of the pairs that exclude each other
        given = [o for o in OPTIONS if not any(o == sorted(pair)[not second] for pair in PAIRS)]
        words = [
            word
            for option in given
            for each in (OPTIONS[option][0] if isinstance(OPTIONS[option][0], list) else [OPTIONS[option][0]])
            for word in ([option] if each is None else [option, each])
        ]
        recipe = shown(*words, tmp_path=tmp_path)
        for option in given:
            section, _, key = OPTIONS[option][1].rpartition(".")
            value = (recipe[section] if section else recipe)[key]
            assert value == OPTIONS[option][2], option
    assert shown(tmp_path=tmp_path) == yaml.safe_load(preset_recipe("recommended")) | {
        "teacher": "some/teacher",
        "out": "made",
    }
    hints = get_type_hints(command.callback, include_extras=True)
    least = {key: option.min for o, (_, key, _) in OPTIONS.items() for option in hints[options[o].name].__metadata__}
    assert {key: least[key] for key in LEAST if least.get(key) is not None}.items() <= LEAST.items()


def test_a_file_changes_what_it_names_alone(tmp_path):
    plan = read(CHANGED, tmp_path)
    expected = LizardConfig.preset("paper").replace(
        attention={"window": 64, "positions": "true", "gate_init": None, "num_sinks": 1, "sink_spread": 2,
                   "kept_keys": [[8, 16], [4, 0]]},
        softmax_layers=[3, 11],
        stage2={"max_steps": 50, "epochs": None, "learning_rate": 1e-3, "betas": [0.9, 0.95], "seed": 1000},
    )  # fmt: skip
    assert plan.config == expected
    changed = {
        "teacher": "some/teacher", "data": ["books/", "no", "it's"], "weights": [2, 0.5, 1],
        "encoding": "latin-1", "stage0": True,
        "stage1": False, "stage2": True, "eval_data": ["held-out"], "eval_length": 4096, "eval_documents": 8,
        "passkey_lengths": [256, 1024], "passkey_trials": 10, "dtype": torch.bfloat16, "device": "cpu",
        "report_to": ("tensorboard",), "diverged": 5, "start": None, "widen": 0, "state_mib": None,
    }  # fmt: skip
    assert {name: getattr(plan, name) for name in changed} == changed and str(plan.out) == "made of this"
    again = read(show(plan), tmp_path)
    assert again == plan


def test_what_is_left_out_is_the_preset(tmp_path):
    plan = read(LEAST_TEXT, tmp_path)
    assert plan.config == LizardConfig.preset("recommended") and plan.stage1 and plan.eval_length == 4096
    assert read(LEAST_TEXT + "stage1:\ndata:\n", tmp_path) == plan  # sections of nothing
    assert read("\ufeff" + LEAST_TEXT, tmp_path) == plan


FAULTS = [
    ("preset: papre\n", 3, "preset: got papre, wanted one of paper, "),
    ("teacher: 7\n", 3, "teacher: is given twice, first in line 1"),
    ("stage1.seed: 3\n", 3, "stage1.seed: stands in its section, wanted stage1: {seed: ...}"),
    ("windwo: 3\n", 3, "windwo: unknown key, wanted one of preset, "),
    ("window: 3\n", 3, "window: unknown key, did you mean attention.window?"),
    ("stage1: {learning_rat: 1}\n", 3, "stage1.learning_rat: unknown key, did you mean stage1.learning_rate?"),
    ("stage1:\n  seed: 0\n  max_steps: 1.5\n", 5, "stage1.max_steps: got 1.5, wanted a whole number or null"),
    ("stage1: {max_steps: 1e3}\n", 3, "stage1.max_steps: got 1e3, wanted a whole number or null"),
    ("stage1: {seed: 010}\n", 3, "stage1.seed: got 010, wanted a whole number"),
    ("stage1: {seed: 1:30}\n", 3, "stage1.seed: got 1:30, wanted a whole number"),
    ("stage1: {run: yes}\n", 3, "stage1.run: got yes, wanted true or false"),
    ("stage1: {run: }\n", 3, "stage1.run: got nothing, wanted true or false"),
    ("stage1: {max_steps: 3, epochs: 2}\n", 3, "stage1.epochs: give one of epochs and max_steps, got epochs=2, "),
    ("stage1: {max_steps: 0}\n", 3, "stage1.max_steps: must be positive, got 0"),
    ("stage2:\n  betas: [1]\n", 4, "stage2.betas: got [1], wanted a list of 2 numbers"),
    ("stage2:\n  lora_targets: q_proj\n", 4, "stage2.lora_targets: got q_proj, wanted a list of texts"),
    ("stage2: 5\n", 3, "stage2: got 5, wanted a section of keys"),
    ("stage2: [1, 2]\n", 3, "stage2: got [1, 2], wanted a section of keys"),
    ("attention:\n\n  window: 0\n", 5, "attention.window: must be at least 1, got 0"),
    ("attention: {gate: no}\n", 3, "attention.gate: got no, wanted one of none, scalar, "),
    ("attention: {gate_init: .nan}\n", 3, "attention.gate_init: got .nan, wanted finite numbers"),
    ("budget: {kept_keys: [[1], x]}\n", 3, "budget.kept_keys: got [[1], x], wanted a whole number or a list of "),
    ("budget: {kept_keys: -1}\n", 3, "budget.kept_keys: "),
    ("budget: {state_mib: .inf}\n", 3, "budget.state_mib: got .inf, wanted finite numbers below 2**48"),
    ("budget: {widen: -1}\n", 3, "budget.widen: got -1, wanted a whole number, at least 0"),
    ("budget: {softmax_layers: [1, 1]}\n", 3, "budget.softmax_layers: must be distinct indices from 0"),
    ("data: {sources: []}\n", 3, "data.sources: got [], wanted files, folders or data sets of the hub"),
    ("data: {sources: [{a: 1}]}\n", 3, "data.sources: got [{a: 1}], wanted a list of texts or null"),
    ("data: {weights: [1, 2]}\n", 3, "data.weights: got [1, 2], wanted a positive number for each of 1 sources"),
    ("data: {sources: [a, b], weights: [1, 0]}\n", 3, "data.weights: got [1, 0], wanted a positive number for each"),
    ("stage3: {max_steps: 5}\n", 3, "stage3.max_steps: stage 3 is left out unless stage3.run is true"),
    ("stage3: {run: true, batch_size: 0}\n", 3, "stage3.batch_size: must be positive, got 0"),
    ("stage2: {run: false}\nstage3: {run: true}\n", 4, "stage3.run: it goes on with what stage 2 trains"),
    ("resume: true\n", 3, "resume: a recipe always goes on"),
    ("evaluation: {passkey_lengths: [256, 0]}\n", 3, "evaluation.passkey_lengths: got [256, 0], wanted a list of "),
    ("evaluation: {length: 1}\n", 3, "evaluation.length: got 1, wanted a whole number, at least 2"),
    ("training: {dtype: float16}\n", 3, "training.dtype: got float16, wanted one of float32, bfloat16 or null"),
    ("training: {save_steps: !!int x}\n", 3, "training.save_steps: got !!int x, which cannot be read"),
    ("training: {device: !!python/name:os.system }\n", 3, "training.device: got !!python/name:os.system"),
    ("from: not/there\n", 3, "from: 'not/there' holds neither a model of lizard-attn nor the work of a run"),
    ("data: {sources: &a [x]}\nevaluation: {data: *a}\n", 4, "is not YAML: aliases (*) are not read, write it out"),
    ("stage1: [\n", 4, "is not YAML: "),
    ("stage1: " + "[" * 5000, 0, "is nested too deeply"),
    ("---\nteacher: x\n", 3, "is not YAML: but found another document"),
    ("? [a, b]\n: 1\n", 3, "?: unknown key, "),
]  # fmt: skip


@pytest.mark.parametrize(("more", "line", "what"), FAULTS, ids=[fault[2][:40] for fault in FAULTS])
def test_a_mistake_is_named_by_line_and_key(more, line, what, tmp_path):
    found = faults(LEAST_TEXT + more, tmp_path)
    assert len(found) == 1 and found[0][0] == line and found[0][1].startswith(what), found


def test_no_depth_is_too_much(tmp_path):
    for depth in (50, 200, 250, 300, 350, 500):
        [fault] = faults(LEAST_TEXT + f"stage1: {{betas: {'[' * depth}{']' * depth}}}", tmp_path)
        assert "stage1.betas: got [" in fault[1] or "is nested too deeply" in fault[1]


def test_all_mistakes_are_named_at_once_in_their_order(tmp_path):
    text = "out: ..\nstage2: {seed: -1}\nattention: {window: 0}\nstage1: {seed: -1}\nteacher: t\n"
    assert [line for line, _ in faults(text, tmp_path)] == [2, 3, 4]
    assert faults("seed: 1\nstage1: {seed: x}\n", tmp_path)[:2] == [
        (0, "out: is missing, wanted a text"),
        (0, "teacher: is missing, wanted a text"),
    ]
    with pytest.raises(RecipeError, match=r"recipe\.yaml:2: .* \(and 2 more: lizard-attn recipe validate .*yaml\)$"):
        read(text, tmp_path)
    assert faults("teacher: t\nout: ..\n", tmp_path) == [(2, "out: got '..', wanted the name of a new folder")]


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"teacher\n", b"[1]\n", b"out: \xff\n", b"out: \x00\n"])
def test_what_is_no_recipe_is_refused(content, tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml(:1)?: (is|holds) "):
        read_recipe(tmp_path / "recipe.yaml")


def test_anything_in_a_file_is_a_plan_or_refused(tmp_path):
    draw = random.Random(0)
    pieces = ["[", "]", "{", "}", ":", "- ", "\n", "  ", "&a ", "*a", "!!", "null", "-1", "1e999", '"', "#", "\t", "é"]
    plans = 0
    for _ in range(150):
        text = CHANGED
        for _ in range(draw.randint(1, 3)):
            at = draw.randrange(len(text))
            text = text[:at] + draw.choice([*pieces, ""]) + text[at + draw.randint(0, 6) :]
        try:
            plans += isinstance(read(text, tmp_path), Plan)
        except RecipeError as error:
            assert all(": " in fault and "\n" not in fault for fault in error.faults)
    assert 5 < plans < 145


@pytest.mark.parametrize(
    "value",
    ["no", "true", "null", "~", "1", "1e-3", "a: b", "", "a#b", "x y", "é\n", "-", "=", "<<", 1e-8, 0.1, 3, None],
)
def test_values_are_read_as_they_were_written(value, tmp_path):
    assert yaml.safe_load(f"a: {written(value)}") == {"a": value}
    if isinstance(value, str) and value:
        assert read(LEAST_TEXT + f"training: {{cache: {written(value)}}}", tmp_path).cache == value


def test_the_document_shows_a_recipe(tmp_path):
    text, longer = re.findall(
        r"```yaml\n(.*?)```", (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(), re.S
    )
    plan = read(text, tmp_path)
    assert plan.weights == [3, 1] and plan.config.stage2.max_steps == 10 and plan.passkey_lengths == [256, 1024]
    plan = read(LEAST_TEXT + longer, tmp_path)
    assert plan.stage3 and plan.config.stage3.sequence_length == 16384
    assert plan.config.stage3.after(plan.config.stage2).learning_rate == 1e-4


def test_types_are_said_in_words():
    assert wanted(int | tuple[tuple[int, ...], ...]) == "a whole number or a list of lists of whole numbers"
    assert json.loads(written([1, "a b"]).replace("'", '"')) == [1, "a b"]
