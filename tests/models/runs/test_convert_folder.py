"""``linearize_folder``: the model of ``linearize``, written shard by shard, in the memory of the new parameters."""

import json
import os
import subprocess
import sys

import pytest
import torch
from readable import byte_tokenizer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import teacher, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config
from typer.testing import CliRunner

from lizard_models import LizardConfig, linearize, linearize_folder
from lizard_models.cli.main import app

CONFIG = LizardConfig.preset("plain", attention={"window": 8})


def saved(folder, shard: str = "50KB", dtype=torch.float32, **changes):
    made = teacher(**changes)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("_proj.bias"):  # which begin as zeros
                parameter.uniform_(-1, 1)
    made.to(dtype)
    made.save_pretrained(folder, max_shard_size=shard)
    return made


@torch.no_grad()
@pytest.mark.parametrize(
    ("preset", "family"),
    [
        *((preset, "llama") for preset in ("plain", "paper", "lolcats", "liger", "window_only")),
        *(("plain", family) for family in ("mistral", "qwen2", "qwen3", "smollm3", "gemma3_text")),
    ],
)
def test_the_folder_holds_what_linearize_makes(tmp_path, preset, family):
    config = LizardConfig.preset(preset, attention={"window": 8})
    original = saved(tmp_path / "teacher", family=family)
    torch.manual_seed(config.stage1.seed)
    made = linearize(original, config)
    loaded = AutoModelForCausalLM.from_pretrained(linearize_folder(tmp_path / "teacher", tmp_path / "out", config))
    for (name, a), (other, b) in zip(made.named_parameters(), loaded.named_parameters(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b)
    assert torch.equal(made(tokens(2, 30)).logits, loaded(tokens(2, 30)).logits)
    ours, theirs = loaded.config.to_dict(), made.config.to_dict()
    assert {k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)} <= {
        "dtype", "transformers_version", "_name_or_path"
    }  # fmt: skip
    assert loaded.generation_config.to_dict() == made.generation_config.to_dict()


@pytest.mark.parametrize(
    "changes",
    [dict(tie_word_embeddings=True), dict(dtype=torch.bfloat16), dict(shard="1GB"), dict(family="mistral")],
    ids=["tied", "bfloat16", "one_file", "mistral"],
)
def test_shards_are_copied_as_they_are(tmp_path, changes):
    made = saved(tmp_path / "teacher", **changes)
    out = linearize_folder(tmp_path / "teacher", tmp_path / "out", CONFIG)
    before = sorted((tmp_path / "teacher").glob("*.safetensors"))
    after = sorted(out.glob("*.safetensors"))
    assert len(after) == len(before) + 1
    assert [path.read_bytes() for path in before] == [path.read_bytes() for path in after[:-1]]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for path in after for t in load_file(path).values())
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == made.dtype and {p.dtype for _, p in loaded.lizard_parameters()} == {torch.float32}
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, made.model.layers[1].mlp.up_proj.weight)


def test_dtype_casts_the_teachers_weights(tmp_path):
    made = saved(tmp_path / "teacher", family="qwen2")
    linearize_folder(tmp_path / "teacher", tmp_path / "out", CONFIG, dtype=torch.bfloat16)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.config.dtype == torch.bfloat16
    assert torch.equal(loaded.model.layers[1].mlp.up_proj.weight, made.model.layers[1].mlp.up_proj.weight.bfloat16())
    torch.manual_seed(CONFIG.stage1.seed)
    new = dict(linearize(made.bfloat16(), CONFIG).lizard_parameters())
    assert all(torch.equal(p, new[name]) for name, p in loaded.lizard_parameters())


def test_the_command_line_and_what_travels_with_the_weights(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    saved(tmp_path / "teacher", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(tmp_path / "teacher")
    commands = {
        "a": ["convert", "--preset", "paper"],
        "b": ["linearize", "--preset", "paper", "--stage1-steps", "0", "--stage2-steps", "0"],
    }
    for name, (command, *options) in commands.items():
        arguments = [command, str(tmp_path / "teacher"), "--out", str(tmp_path / name), *options]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0 and "saved, untrained" in result.output, result.output
        assert json.loads((tmp_path / name / "training.json").read_text())["teacher"] == str(tmp_path / "teacher")
        travelled = AutoTokenizer.from_pretrained(tmp_path / name)
        assert travelled.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    again = CliRunner().invoke(app, ["convert", str(tmp_path / "teacher"), "--out", str(tmp_path / "a")])
    assert again.exit_code == 2 and "exists already" in again.stderr


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: first_shard(f).write_bytes(first_shard(f).read_bytes()[:-9]), "00001-of.*damaged or cut short"),
        (lambda f: first_shard(f).write_bytes(b"not a model"), "00001-of.*damaged or cut short"),
        (lambda f: first_shard(f).unlink(), "00001-of.*is missing, though the index names it"),
        (lambda f: change(f, lambda w: w.pop(next(iter(w)))), "missing tensors"),
        (lambda f: change(f, lambda w: w.update(stray=torch.zeros(1))), "unexpected tensors.*stray"),
        (lambda f: change(f, lambda w: w.update(dict.fromkeys(list(w)[:1], torch.zeros(3)))), "misshapen tensors"),
        (
            lambda f: [path.rename(path.with_suffix(".bin")) for path in all_weights(f)],
            "found model-00001-of-.*pickles, which can run code",
        ),
        (lambda f: GPT2Config().save_pretrained(f), "GPT2Attention has no separate q_proj"),
        (lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), "is quantized"),
    ],
)
def test_a_bad_teacher_is_refused_and_nothing_written(tmp_path, break_it, message):
    saved(tmp_path / "teacher")
    break_it(tmp_path / "teacher")
    with pytest.raises(ValueError, match=message):
        linearize_folder(tmp_path / "teacher", tmp_path / "out", CONFIG)
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_buffers_of_old_checkpoints_are_let_pass(tmp_path):
    saved(tmp_path / "teacher")
    change(tmp_path / "teacher", lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    old = AutoModelForCausalLM.from_pretrained(linearize_folder(tmp_path / "teacher", tmp_path / "out", CONFIG))
    change(tmp_path / "teacher", lambda w: w.pop("model.layers.0.self_attn.rotary_emb.inv_freq"))
    now = AutoModelForCausalLM.from_pretrained(linearize_folder(tmp_path / "teacher", tmp_path / "now", CONFIG))
    assert old.state_dict().keys() == now.state_dict().keys()
    ids = torch.arange(1, 40)[None]
    assert torch.equal(old(ids).logits, now(ids).logits)


def first_shard(folder):
    return all_weights(folder)[0]


def all_weights(folder):
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.index.json")])


def change(folder, edit):
    weights = load_file(first_shard(folder))
    edit(weights)
    save_file(weights, first_shard(folder), metadata={"format": "pt"})


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


MEASURE = """
import pathlib, re, sys
import torch
from lizard_models import LizardConfig, linearize_folder

def resident(field):
    return 1024 * int(re.search(field + r":\\s+(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])

config = LizardConfig.preset("plain", attention={"window": 8})
linearize_folder(sys.argv[1], sys.argv[2] + "-first", config)
for out, dtype in ((sys.argv[2] + "-same", None), (sys.argv[2] + "-cast", torch.bfloat16)):
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts again
    before = resident("VmRSS")
    linearize_folder(sys.argv[2], out, config, dtype=dtype)
    print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_under_a_shard(tmp_path):
    """Copied, a model of many shards takes less than one of them; cast, less than two and the largest tensor."""
    saved(tmp_path / "small")
    saved(tmp_path / "large", "8MB", hidden_size=512, intermediate_size=2048, num_hidden_layers=4)
    shard = max(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 6
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / "large")],
        capture_output=True, text=True, env=os.environ, check=True,
    )  # fmt: skip
    same, cast = map(int, done.stdout.split())
    assert same < shard and cast < 2 * shard + 4 * 512 * 2048
    with safe_open(sorted(tmp_path.glob("large-same/*.safetensors"))[-1], framework="pt") as file:
        assert "model.layers.3.self_attn.lizard.gate.bias" in file.keys()  # noqa: SIM118
