"""The command line: the whole path on a tiny teacher, and one line for every mistake a user can make."""

import errno
import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from cli_calls import call, error
from huggingface_hub import ModelCard
from readable import save_teacher, save_texts
from safetensors import SafetensorError
from training import Sequences
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2Config
from typer.testing import CliRunner

from lizard_models import LizardConfig, linearize
from lizard_models.cli.main import app
from lizard_models.cli.options import read_settings
from lizard_models.evaluation.restoration import restoration_savings
from lizard_models.model.families.llama import LizardLlamaForCausalLM
from lizard_models.model.layer_configs import kept_layers, lizard_config
from lizard_models.runs import linearize_run as pipeline
from lizard_models.runs import memory, run_data
from lizard_models.runs.plan import work_folder
from lizard_models.text.sequences import load_documents

RECIPE = ["--preset", "plain", "--stage1-steps", "3", "--stage2-steps", "2", "--seq-len", "64", "--batch-size", "2"]
SMALL = [*RECIPE, "--set", "attention.window=16", "--device", "cpu"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    save_teacher(folder / "teacher")
    save_texts(folder / "texts")
    return folder


@pytest.fixture(scope="module")
def model(world):
    measured = ["--eval-data", world / "texts", "--eval-length", "200", "--eval-documents", "2", "--passkey", "400"]
    out = world / "model"
    result = call("linearize", world / "teacher", "--data", world / "texts", *measured, *SMALL, "--out", out)
    return out, result.output


def test_linearize_saves_a_model_and_what_was_measured(model):
    out, output = model
    for text in ("after stage 1", "after stage 2", "window control", "share", "passkey found", "saved:"):
        assert text in output
    assert {"model.safetensors", "tokenizer.json", "evaluation.json", "evaluation.png", "training.json"} <= {
        file.name for file in out.iterdir()
    }
    assert not work_folder(out).exists()
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and "lizard_llama" in card.data.tags
    for text in ("preset `plain`: window 16", "stage1: 3 steps of 2 x 64", "stage2: 2 steps", "Passkeys found"):
        assert text in card.text
    training = json.loads((out / "training.json").read_text())
    assert training["stages"]["stage1"]["steps"] == 3 and len(training["eval_hash"]) == 64
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert lizard_config(loaded.config).attention.window == 16


def test_generate_continues_in_bounded_state(model, monkeypatch):
    result = call("generate", model[0], "the wind turns", "-n", "5", "--device", "cpu")
    assert result.stdout.startswith("the wind turns")
    assert "14 tokens read, 5 written" in result.stderr and "MB of state" in result.stderr
    sampled = [
        call("generate", model[0], "a", "-n", "9", "--temperature", "2", "--seed", seed).stdout for seed in "112"
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    piped = CliRunner().invoke(app, ["generate", str(model[0]), "-", "-n", "2"], input="from a pipe")
    assert piped.stdout.startswith("from a pipe")
    monkeypatch.setattr("lizard_models.text.prompts.PREFILL_CHUNK", 3)
    assert call("generate", model[0], "the wind turns", "-n", "5", "--device", "cpu").stdout == result.stdout
    assert error("generate", model[0], "") == "error: prompt is empty: give some text to continue"


def test_eval_compares_with_the_recorded_teacher(model, world, tmp_path):
    arguments = ["--data", world / "texts", "--eval-length", "200", "--lengths", "400", "--trials", "2"]
    result = call("eval", model[0], *arguments, "--device", "cpu", "--out", tmp_path / "report")
    for text in ("teacher", "window control", "this model", "400"):
        assert text in result.output
    rows = json.loads((tmp_path / "report" / "evaluation.json").read_text())["rows"]
    before = json.loads((model[0] / "evaluation.json").read_text())["rows"]
    assert rows[0]["loss"]["means"] != [] and before[0]["name"] == rows[0]["name"] == "teacher"
    alone = call("eval", world / "teacher", *arguments, "--device", "cpu")
    assert "window control" not in alone.output
    assert "nothing to measure" in error("eval", model[0])
    assert "--lengths is 'x'" in error("eval", model[0], "--lengths", "x")
    assert "leave --teacher out" in error("eval", world / "teacher", "--lengths", "400", "--teacher", "x")


def test_layers_are_ranked_by_what_restoring_them_saves(world, model, tmp_path):
    recipe = [
        "--preset",
        "plain",
        "--stage1-steps",
        "1",
        "--stage2-steps",
        "0",
        "--seq-len",
        "64",
        "--batch-size",
        "2",
        "--device",
        "cpu",
    ]
    first = tmp_path / "first"
    call(
        "linearize",
        world / "teacher",
        "--data",
        world / "texts",
        *recipe,
        "--set",
        "attention.window=16",
        "--out",
        first,
    )
    data, lengths = ["--eval-data", world / "texts"], ["--eval-length", "120", "--eval-documents", "2"]
    output = call("layers", first, *data, *lengths, "--device", "cpu").output
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (first, world / "teacher"))
    tokens = load_documents([str(world / "texts")], AutoTokenizer.from_pretrained(first), 121, count=2).tokens
    found = restoration_savings(student, teacher, tokens)
    assert f"KL to the teacher {found['kl']:.4f}" in output
    rows = [line.split("│") for line in output.splitlines() if "%" in line and "│" in line]
    assert [int(row[2]) for row in rows] == found["order"]
    best = found["order"][0]
    assert f"--softmax-layers {best}" in output and f"--set wide_layers=[{best}]" in output
    assert read_settings([f"wide_layers=[{best}]"]) == {"wide_layers": [best]}
    assert "wanted more than the 20 positions" in error("layers", first, *data, "--eval-length", "20")
    assert "is fine-tuned" in error("layers", model[0], *data)
    assert "is not linearized" in error("layers", world / "teacher", *data)


def test_info_counts_what_the_models_hold(model, world):
    loaded = AutoModelForCausalLM.from_pretrained(model[0])
    everything = sum(p.numel() for p in loaded.parameters())
    new = sum(p.numel() for _, p in loaded.lizard_parameters())
    for output in (
        call("info", model[0]).output,
        call("info", world / "teacher", "--preset", "plain", "--set", "attention.window=16").output,
    ):
        assert f"{everything:,}, of which {new:,} are new" in output
    ids = torch.arange(5, 90).view(1, -1)
    cache = loaded(ids, use_cache=True).past_key_values
    assert cache.state_bytes() == memory.lizard_bytes(loaded.config, ids.shape[1], torch.float32)
    teacher = AutoModelForCausalLM.from_pretrained(world / "teacher")
    kept = DynamicCache(config=teacher.config)
    teacher(ids, past_key_values=kept)
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in kept.layers)
    assert size == memory.cache_bytes(teacher.config, 85, torch.float32)
    hybrid = linearize(teacher, LizardConfig.preset("plain").replace(softmax_layers=[1]))
    cache = hybrid(ids, use_cache=True).past_key_values
    assert cache.state_bytes() == memory.lizard_bytes(hybrid.config, 85, torch.float32)
    assert "linearized already" in error("info", model[0], "--preset", "paper")


def test_layers_are_kept_as_the_options_say(world, tmp_path):
    for options, kept in ((["--softmax-layers", "0,2"], [0, 2]), (["--softmax-share", "0.4", "--keep-sliding"], [1])):
        out = tmp_path / options[0]
        call("convert", world / "teacher", *options, "--out", out)
        assert kept_layers(AutoConfig.from_pretrained(out)) == kept
    bad = ["convert", world / "teacher", "--out", tmp_path / "bad"]
    assert "--softmax-layers is 'x'" in error(*bad, "--softmax-layers", "x")
    assert "give one of --softmax-layers and --softmax-share" in error(
        *bad, "--softmax-layers", "1", "--softmax-share", "0.5"
    )
    assert "softmax_layers=[7], but the model has layers 0 to 2" in error(*bad, "--softmax-layers", "7")


def test_help_teaches_by_example():
    for name in ("linearize", "generate", "eval", "demo", "info"):
        assert f"lizard-attn {name}" in call(name, "--help").output
    assert "linearize" in call("--help").output


def test_mistakes_are_one_line_that_names_the_remedy(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "there").mkdir()
    good = {"teacher": world / "teacher", "data": world / "texts", "out": out}

    def attempt(*more: str, **changes) -> str:
        chosen = {**good, **changes}
        return error("linearize", chosen["teacher"], "--data", chosen["data"], "--out", chosen["out"], *SMALL, *more)

    for line, reason in (
        (attempt("--preset", "best"), "unknown preset 'best', choose one of paper, "),
        (attempt(teacher=tmp_path / "nowhere"), "is not a folder; wanted a saved model"),
        (attempt(teacher=tmp_path / "gpt2"), "GPT2Attention has no separate q_proj"),
        (attempt(data=tmp_path / "nowhere.txt"), "does not exist; give a file, a folder"),
        (attempt(data=tmp_path / "short.txt"), "fewer than one sequence of seq_len=64"),
        (attempt("--eval-data", str(tmp_path / "short.txt")), "give longer documents or a smaller --eval-length"),
        (attempt(out=tmp_path / "there"), "exists already; give another folder"),
        (attempt("--resume"), "no unfinished run"),
        (attempt("--set", "attention.windows=3"), "unknown keys in Lizard config: attention.windows"),
        (attempt("--set", "window"), "wanted FIELD=VALUE"),
        (attempt("--dtype", "int8"), "wanted float32 or bfloat16"),
        (attempt("--device", "tpu"), "wanted cpu or cuda"),
        (error("generate", tmp_path / "nowhere", "x"), "is not a folder; make one with `lizard-attn linearize`"),
        (error("generate", tmp_path / "there", "x"), "has no config.json"),
    ):
        assert line.startswith("error: ") and reason in line
    assert not out.exists() and not work_folder(out).exists()


def test_settings_nest_and_keep_their_types():
    pairs = ["attention.window=64", "attention.gate=none", "softmax_layers=[1, 2]", "stage1.learning_rate=3e-3"]
    assert read_settings(pairs) == {
        "attention": {"window": 64, "gate": "none"},
        "softmax_layers": [1, 2],
        "stage1": {"learning_rate": 0.003},
    }


def test_layers_are_widened_after_stage_1_and_a_resumed_run_keeps_its_choice(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    measured = ["--eval-data", world / "texts", "--eval-length", "200", "--eval-documents", "2"]
    start = ["linearize", world / "teacher", "--data", world / "texts", *measured, *SMALL, "--out", out]
    command = [*start, "--set", "wide_window=32", "--widen", "1"]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(pipeline, "train_stage2", stop)
        assert "window of 32 where it is needed most: layers [" in call(*command, code=130).stdout
    layers = json.loads((work_folder(out) / "wide_layers.json").read_text())
    assert "other widen" in error(*command[:-2], "--resume")
    with monkeypatch.context() as resumed:
        resumed.setattr(pipeline, "neediest_layers", lambda *args, **kwargs: pytest.fail("chosen again"))
        output = call(*command, "--resume").output
    for row in ("after stage 1", "control, widened", "widened", "after stage 2"):
        assert row in output
    chosen = lizard_config(AutoConfig.from_pretrained(out))
    assert chosen.wide_layers == tuple(layers) and chosen.wide_window == 32
    training = json.loads((out / "training.json").read_text())
    assert training["widen"] == 1 and training["config"]["wide_layers"] == layers
    assert f"window 32 in layers {layers}" in ModelCard.load(out / "README.md").text

    other = [*start[:-1], tmp_path / "other", "--set", "wide_window=32", "--widen"]
    assert "widen: layers are chosen after stage 1" in error(*other, "1", "--stage1-steps", "0")
    assert "wide_window=8 must be at least" in error(*other, "1", "--set", "wide_window=8")
    for planned in ([], ["--dry-run"]):
        assert "widen: got 9 layers, wanted 1 to 3" in error(*other, "9", *planned)
        assert "widen: got wide_layers=[0] as well" in error(*other, "1", "--set", "wide_layers=[0]", *planned)
        assert "widen: got texts of 17 tokens" in error(*other, "1", "--seq-len", "18", *planned)
    plans = [call(*other, count, "--dry-run", "--set", "wide_window=64").stdout for count in ("0", "2")]
    assert plans[0] != plans[1]
    assert "sequences of 64 tokens never leave a window of 64" in call(*other, "1", "--set", "wide_window=64").stdout


def test_an_interrupted_run_is_resumed_as_the_message_says(world, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ["linearize", world / "teacher", "--data", world / "texts", *SMALL, "--out", out]
    monkeypatch.setattr("sys.argv", ["lizard-attn", *map(str, command)])
    with monkeypatch.context() as stopped:
        stopped.setattr(run_data, "load_mixture", lambda *args, **kwargs: Sequences(stop_at=3))
        line = error(*command, code=130)
    assert "stage 1, attention approximation stopped at step" in line and "nothing half-written" in line
    assert line.endswith(f"--out {out} --resume")
    assert not out.exists() and work_folder(out).exists()
    assert "holds an unfinished run; go on with --resume" in error(*command)
    monkeypatch.setattr(run_data, "load_mixture", lambda *args, **kwargs: Sequences())
    assert "with other config" in error(*command, "--resume", "--seed", "5")
    call(*command, "--resume")
    assert (out / "model.safetensors").exists() and not work_folder(out).exists()


def test_a_full_disk_leaves_no_model(world, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full_halfway(model, folder, **kwargs):
        (folder / "model.safetensors").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    out = tmp_path / "out"
    command = ["linearize", world / "teacher", "--data", world / "texts", *SMALL, "--out", out]
    with monkeypatch.context() as disk:
        disk.setattr(pipeline.Report, "save", full)
        line = error(*command)
    assert "error: the disk is full: free some space" in line and "then go on with: lizard-attn" in line
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["out.training"]
    with monkeypatch.context() as disk:
        disk.setattr(LizardLlamaForCausalLM, "save_pretrained", full_halfway)
        assert "error: the disk is full" in error(*command, "--resume")
    assert [path.name for path in tmp_path.iterdir()] == ["out.training"]
    call(*command, "--resume")  # nothing is trained again
    assert (out / "config.json").exists()


def test_a_disk_too_small_is_seen_before_the_run(world, tmp_path, monkeypatch):
    teacher = AutoModelForCausalLM.from_pretrained(world / "teacher")
    config = LizardConfig.preset("plain")
    needed = pipeline.disk_needed(linearize(teacher, config), config, ["stage1", "stage2"])
    assert sum(p.nbytes for p in teacher.parameters()) < needed < 7_000_000  # most of it adapters and their moments
    free = [needed // 2]
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=free[0]))
    out = tmp_path / "a" / "out"
    command = ["linearize", world / "teacher", "--data", world / "texts", *RECIPE, "--device", "cpu", "--out", out]
    line = error(*command)
    assert f"error: --out: the run takes about {needed / 1e6:.1f} MB, but the disk of" in line
    assert "--out on another disk" in line
    assert not any(tmp_path.iterdir())
    free[0] = needed
    call(*command)


def test_models_have_names_too(world, tmp_path, monkeypatch):
    monkeypatch.setattr("lizard_models.teachers.loading.hub_answers", lambda: False)
    shutil.copytree(world / "teacher", tmp_path / "teachers" / "smollm2-135m")
    arguments = ["--teacher", "none", "--lengths", "400", "--trials", "1", "--device", "cpu", "--cache", tmp_path]
    assert "this model" in call("eval", "smollm2-135m", *arguments).output
    assert "is not a folder, and the hub does not answer" in error("generate", "owner/missing", "x")


def test_missing_extras_are_named_before_anything_is_measured(model, world, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    line = error("eval", model[0], "--data", world / "texts", "--tasks", "piqa", "--device", "cpu")
    assert line == "error: --tasks: lm-eval is not installed; pip install 'lizard-attn[eval]'"
    monkeypatch.delitem(sys.modules, "lizard_models.evaluation.plot", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    arguments = ["--lengths", "400", "--trials", "1", "--device", "cpu", "--out", tmp_path]
    assert "no plot is drawn, matplotlib is missing: pip install" in call("eval", model[0], *arguments).output
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_damaged_weights_are_one_line(model, tmp_path):
    shutil.copytree(model[0], tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    line = error("generate", tmp_path / "cut", "x", "--device", "cpu")
    assert "model.safetensors is damaged or cut short" in line and "copy the model again" in line


def test_stages_can_be_left_out(world, tmp_path):
    arguments = ["linearize", world / "teacher", "--data", world / "texts", *SMALL]
    call(*arguments, "--stage1-steps", "0", "--stage2-steps", "0", "--out", tmp_path / "untrained")
    assert json.loads((tmp_path / "untrained" / "training.json").read_text())["stages"] == {}
    output = call(*arguments, "--preset", "liger", "--stage2-steps", "1", "--out", tmp_path / "liger").output
    assert "stage 1 is left out: preset liger has no new parameters" in output
