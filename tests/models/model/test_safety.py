"""Checkpoints are data: nothing pickled is read, nothing in them is run, damage is refused with the file's name."""

import json

import pytest
import torch
from readable import byte_tokenizer
from safetensors.torch import load_file, save_file
from tiny import student, tokens
from training import Sequences, arguments, fresh, recipes
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from lizard_models import load_teacher
from lizard_models.cli.main import app
from lizard_models.distill import checkpoint_files, train_stage1
from lizard_models.files.folders import write_sums
from lizard_models.model.families.llama import LizardLlamaForCausalLM
from lizard_models.teachers.loading import load_model


def save(folder, shard: str = "1GB"):
    tokenizer = byte_tokenizer()
    student(vocab_size=len(tokenizer)).save_pretrained(folder, max_shard_size=shard)
    tokenizer.save_pretrained(folder)
    return folder


def by_command_line(folder):
    result = CliRunner().invoke(app, ["generate", str(folder), "a", "-n", "1", "--device", "cpu"])
    if result.exit_code == 0:
        return result.stdout
    lines = result.stderr.strip().splitlines()
    assert result.exit_code == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.output
    raise ValueError(lines[0])


READERS = {
    "from_pretrained": AutoModelForCausalLM.from_pretrained,
    "load_model": lambda folder: load_model(str(folder)),
    "command line": by_command_line,
}


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def cut(path, by: int = 9):
    path.write_bytes(path.read_bytes()[:-by])


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path, edit):
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def as_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def newer(folder):
    values = json.loads((folder / "config.json").read_text())
    edit_json(folder / "config.json", lizard=values["lizard"] | {"version": 99, "another_field": 1})


DAMAGE = {
    "cut short": (lambda f: cut(f / "model.safetensors"), "model.safetensors is damaged or cut short"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is damaged or cut short"),
    "overwritten": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 99), "model.safetensors is damaged"),
    "pickled": (as_pickle, "found pytorch_model.bin: pickles, which can run code and are never read"),
    "without weights": (lambda f: (f / "model.safetensors").unlink(), "found no weights; wanted model.safetensors"),
    "missing key": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
        r"missing keys: (model\.)?layers.1.mlp.up_proj.weight",
    ),
    "unexpected key": (
        lambda f: edit_weights(f / "model.safetensors", lambda w: w.update(stray=torch.zeros(1))),
        "unexpected keys: stray",
    ),
    "newer": (newer, "version 99, this lizard-attn reads version 1: update lizard-attn"),
    "not JSON": (lambda f: (f / "config.json").write_text('{"model_type": '), "config.json"),
}
SHARDED = {
    "shard cut short": (lambda f: cut(shards(f)[1]), "model-00002-of-.* is damaged or cut short"),
    "shard missing": (lambda f: shards(f)[1].unlink(), "model-00002-of-.* is missing, though the index names it"),
    "index": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "model.safetensors.index.json is damaged",
    ),
    "index pointing outside": (
        lambda f: edit_json(f / "model.safetensors.index.json", weight_map={"lm_head.weight": "../x.safetensors"}),
        "names '../x.safetensors', which is not a file of its folder",
    ),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", [*DAMAGE, *SHARDED])
def test_damage_is_refused_by_name(tmp_path, damage, reader):
    break_it, message = (DAMAGE | SHARDED)[damage]
    break_it(save(tmp_path, "50KB" if damage in SHARDED else "1GB"))
    with pytest.raises((ValueError, OSError), match=message):
        READERS[reader](tmp_path)


@pytest.mark.parametrize("damage", ["cut short", "pickled", "missing key"])
def test_the_bare_decoder_refuses_damage_too(tmp_path, damage):
    DAMAGE[damage][0](save(tmp_path))
    with pytest.raises(ValueError, match=DAMAGE[damage][1]):
        AutoModel.from_pretrained(tmp_path)


def test_a_teacher_is_read_as_safely(tmp_path):
    from readable import save_teacher

    save_teacher(tmp_path)
    cut(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="teacher .*model.safetensors is damaged or cut short"):
        load_teacher(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="teacher .*found pytorch_model.bin: pickles"):
        load_teacher(str(tmp_path))


def test_pickles_are_refused_even_when_asked_for(tmp_path):
    save(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors=False: pickled weights can run code"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=False)
    as_pickle(tmp_path)
    with pytest.raises(ValueError, match="found pytorch_model.bin: pickles"):
        AutoModelForCausalLM.from_pretrained(tmp_path, use_safetensors=None)
    save(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    torch.save({}, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match="adapter_model.bin is a pickle"):
        LizardLlamaForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("trust", [None, False, True])
def test_no_code_of_a_checkpoint_is_run(tmp_path, trust):
    folder, ran = save(tmp_path / "model"), tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w').write('it ran')\n"
    (folder / "evil.py").write_text(code)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(code + "def generate(model, **_): return None\n")
    classes = {"AutoConfig": "evil.C", "AutoModel": "evil.M", "AutoModelForCausalLM": "evil.M"}
    edit_json(folder / "config.json", auto_map=classes)
    for auto in (AutoModelForCausalLM, AutoModel):
        model = auto.from_pretrained(folder, trust_remote_code=trust)
        assert type(model).__module__.startswith("lizard_models.")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust)
    assert model.generate(tokens(1, 4), max_new_tokens=2, do_sample=False).shape == (1, 6)
    load_model(str(folder))
    by_command_line(folder)
    edit_json(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.T", None]}, tokenizer_class="Evil")
    with pytest.raises(ValueError, match="tokenizer of .* cannot be read: .*custom code"):
        load_model(str(folder))
    edit_json(folder / "config.json", model_type="strange")
    for read in (lambda: load_model(str(folder)), lambda: load_teacher(str(folder))):
        with pytest.raises(ValueError, match="custom code"):
            read()
    assert not ran.exists()


def test_other_files_of_the_folder_are_named_too(tmp_path):
    save(tmp_path)
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(ValueError, match=r"training.json is damaged"):
        load_model(str(tmp_path))
    (tmp_path / "training.json").unlink()
    cut(tmp_path / "tokenizer.json", 99)
    with pytest.raises(ValueError, match="the tokenizer of .* cannot be read"):
        load_model(str(tmp_path))
    edit_json(tmp_path / "config.json", model_type="lizard_later")
    with pytest.raises(ValueError, match="config.json is of a 'lizard_later' model.*update lizard-attn"):
        load_model(str(tmp_path))


def test_a_saved_model_is_safetensors_and_text(tmp_path):
    kinds = {path.suffix for path in save(tmp_path).rglob("*")}
    assert kinds == {".json", ".safetensors"}
    assert AutoTokenizer.from_pretrained(tmp_path).decode([70]) == byte_tokenizer().decode([70])


def test_training_checkpoints_hold_nothing_pickled(tmp_path):
    model = fresh()
    recipe = recipes(model, steps=2)[0]
    train_stage1(model, Sequences(), arguments(tmp_path), recipe)
    checkpoint = tmp_path / "checkpoint-2"
    assert {path.suffix for path in checkpoint.iterdir()} == {".json", ".safetensors"}
    with pytest.raises(ValueError, match="trained.safetensors cannot be read"):
        cut(checkpoint / "trained.safetensors")
        train_stage1(fresh(), Sequences(), arguments(tmp_path, resume=True), recipe)
    torch.save({}, checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match="holds optimizer.pt: pickles, which can run code and are never read"):
        train_stage1(fresh(), Sequences(), arguments(tmp_path, resume=True), recipe)


def test_optimizer_state_comes_back_to_the_last_bit(tmp_path):
    def step(model, optimizer):
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 12).view(4, 3)).square().sum().backward()
        optimizer.step()

    models, optimizers = [], []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(torch.nn.Linear(3, 2))
        groups = [{"params": [models[-1].weight], "lr": torch.tensor(0.1)}, {"params": [models[-1].bias], "lr": 1 / 3}]
        optimizers.append(torch.optim.AdamW(groups, betas=(0.8, 0.99), foreach=False))
    step(models[0], optimizers[0])
    checkpoint_files.save_optimizer_state(optimizers[0].state_dict(), tmp_path / "o.safetensors")
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(checkpoint_files.read_optimizer_state(tmp_path / "o.safetensors"))
    for model, optimizer in zip(models, optimizers, strict=True):
        step(model, optimizer)
    assert torch.equal(models[0].weight, models[1].weight) and torch.equal(models[0].bias, models[1].bias)
    assert isinstance(optimizers[1].param_groups[0]["lr"], torch.Tensor)


def test_a_changed_bit_is_seen_where_the_folder_has_sums(tmp_path):
    write_sums(save(tmp_path))
    load_model(str(tmp_path))
    file = tmp_path / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="model.safetensors is damaged or cut short, or changed since .*SHA256SUMS"):
        load_model(str(tmp_path))
    (tmp_path / "SHA256SUMS").unlink()
    load_model(str(tmp_path))
