"""State files: prompts go on from a text read before, and every file that does not fit is refused by name."""

import json
import os

import pytest
import torch
from cli_calls import call, error
from readable import save_teacher
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import student, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from lizard_models import LizardConfig, linearize, load_state, save_state
from lizard_models.files.records import SEAL
from lizard_models.model.state_file import checksum, place_for


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax_layers": (1,)},
        {"family": "mistral", "sliding_window": 12, "softmax_layers": (1,)},
        {"bf16": True},
        {"attention": {"kept_keys": 5}},
    ],
    ids=["lizard", "kept", "sliding", "bf16", "kept keys"],
)
def test_prompts_go_on_from_the_file(options, tmp_path):
    options = dict(options)
    half = options.pop("bf16", False)
    model, text, more = student(**options), tokens(1, 40), tokens(1, 5, seed=8)
    model = model.bfloat16() if half else model
    cache = model(text).past_key_values
    size = save_state(tmp_path / "book.state", model, cache)
    assert size == (tmp_path / "book.state").stat().st_size and size - cache.state_bytes() < 16_000
    settings = dict(max_new_tokens=8, do_sample=False)
    loaded = load_state(tmp_path / "book.state", model)
    wanted = model.generate(**cache.copy().inputs_for(more), **settings)
    for _ in range(2):
        assert torch.equal(model.generate(**loaded.copy().inputs_for(more), **settings), wanted)
    if not half:
        assert torch.equal(model.generate(torch.cat([text, more], 1), **settings)[:, 40:], wanted)
    assert loaded.get_seq_length() == 40


@torch.no_grad()
def test_rows_of_different_lengths(tmp_path):
    model, ids, mask = student(), tokens(2, 20), torch.ones(2, 20, dtype=torch.long)
    mask[0, 13:] = 0
    cache = model(ids, attention_mask=mask).past_key_values
    save_state(tmp_path / "two.state", model, cache)
    loaded = load_state(tmp_path / "two.state", model)
    assert loaded.positions().tolist() == [13, 20]
    found = model.generate(**loaded.inputs_for(ids[:, :3]), max_new_tokens=4, do_sample=False)
    alone = model.generate(torch.cat([ids[:1, :13], ids[:1, :3]], 1), max_new_tokens=4, do_sample=False)
    assert torch.equal(found[0, 3:], alone[0, 16:])


@pytest.fixture
def saved(tmp_path):
    model = student()
    path = tmp_path / "book.state"
    save_state(path, model, model(tokens(1, 20)).past_key_values)
    return model, path


def rewrite(path, tensors=lambda t: t, **changes):
    """As a version wrote it that knew no sum of what a file says of itself."""
    with safe_open(path, "pt") as file:
        held, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    metadata.pop(SEAL, None)
    save_file(tensors(held), path, metadata | changes)


def test_other_models_are_refused(saved):
    model, path = saved
    with pytest.raises(ValueError, match="book.state' was made by a model with other weights"):
        load_state(path, student(seed=5))
    with pytest.raises(ValueError, match="book.state' was made by another model: attention.window=8, here 9"):
        load_state(path, student(window=9))
    with pytest.raises(ValueError, match=r"kept_layers=\[\], here \[1\]"):
        load_state(path, student(softmax_layers=(1,)))
    with pytest.raises(ValueError, match="made in float32, but the model is in bfloat16"):
        load_state(path, student().bfloat16())
    one = next(iter(model.lizard_parameters()))[1]
    one.view(-1)[3] += 1e-6
    with pytest.raises(ValueError, match="other weights"):
        load_state(path, model)


def test_a_bit_flipped_in_what_a_file_says_of_itself_is_seen(saved):
    """But in the name of its sum: then it is a file of before there were any, in which nothing else has changed."""
    model, path = saved
    whole = path.read_bytes()
    header, name = 8 + int.from_bytes(whole[:8], "little"), whole.index(f'"{SEAL}"'.encode())
    places = {*range(8, header, 41), whole.index(b'"positions":"20"') + 14} - {*range(name, name + len(SEAL) + 2)}
    assert len(places) > 90
    for at in places:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(ValueError, match="book.state' is (truncated or damaged|damaged|no state file)|has version"):
            load_state(path, model)


def test_what_a_state_does_not_depend_on_may_differ(saved):
    _, path = saved
    clamped = student(attention={"positions": "clamped", "impl": "torch"})
    assert load_state(path, clamped).get_seq_length() == 20


def test_files_of_before_fields_were_retired(saved):
    model, path = saved
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    rewrite(path, config=json.dumps(config | {"attention.memory": "sum", "attention.key_conv": 0}))
    assert load_state(path, model).get_seq_length() == 20
    model.config.lizard["attention"]["merge_mass"] = "relative"  # as a model saved before still has it
    assert load_state(path, model).get_seq_length() == 20
    rewrite(path, config=json.dumps(config | {"attention.memory": "delta"}))
    with pytest.raises(ValueError, match="made by another model: attention.memory='delta', here 'sum'"):
        load_state(path, model)


def test_files_of_before_keys_were_kept(saved):
    model, path = saved
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    for name in ("kept_keys", "score_dim", "score_received", "score_stride"):
        del config[f"attention.{name}"]
    rewrite(path, config=json.dumps(config))
    assert load_state(path, model).get_seq_length() == 20
    with pytest.raises(ValueError, match="made by another model: attention.kept_keys=0, here 5"):
        load_state(path, student(attention={"kept_keys": 5}))


def test_bad_files_are_refused_by_name(saved):
    model, path = saved
    whole = path.read_bytes()
    for length in (0, 5, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="book.state' is truncated or damaged"):
            load_state(path, model)
    changed = bytearray(whole)
    changed[-100] ^= 1
    path.write_bytes(changed)
    with pytest.raises(ValueError, match="book.state' is damaged: its tensors do not have the checksum"):
        load_state(path, model)
    path.write_bytes(whole)
    rewrite(path, version="2")
    with pytest.raises(ValueError, match="version 2, this lizard-attn reads 1: update"):
        load_state(path, model)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="book.state' is no state file"):
        load_state(path, model)
    path.write_bytes(whole)

    def without_a_layer(tensors):
        return {name: t for name, t in tensors.items() if not name.startswith("layers.2.")}

    with safe_open(path, "pt") as file:
        left = without_a_layer({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    rewrite(path, without_a_layer, data=checksum(sorted(left.items())))
    with pytest.raises(ValueError, match="does not hold the layers of this model"):
        load_state(path, model)
    with pytest.raises(ValueError, match="missing.state' does not exist"):
        load_state(path.with_name("missing.state"), model)


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = student(softmax_layers=(1,))
    with pytest.raises(ValueError, match="cache: has read nothing"):
        save_state(tmp_path / "x", model, model.new_cache())
    with pytest.raises(ValueError, match="cache: got DynamicCache"):
        save_state(tmp_path / "x", model, DynamicCache())
    static = model(tokens(1, 9), past_key_values=model.new_cache(static=True, max_cache_len=16)).past_key_values
    with pytest.raises(ValueError, match="StaticLayer; a static cache cannot be saved"):
        save_state(tmp_path / "x", model, static)
    with pytest.raises(ValueError, match="there is no folder"):
        save_state(tmp_path / "no" / "x", student(), student()(tokens(1, 9)).past_key_values)
    assert not list(tmp_path.iterdir())


def test_every_bit_and_every_place_counts():
    x = torch.randn(1003, dtype=torch.float64).to(torch.bfloat16)
    sums = {checksum([("x", x)])}
    for i in (0, 3, 517, 1002):
        y = x.clone()
        y.view(torch.int16)[i] ^= 1
        sums.add(checksum([("x", y)]))
    sums.add(checksum([("x", x.roll(8))]))
    sums.add(checksum([("y", x)]))
    sums.add(checksum([("x", x[:-1])]))
    assert len(sums) == 8
    assert checksum([("x", x.view(17, 59).t().contiguous().t())]) == checksum([("x", x.view(17, 59))])


def test_the_command_line_reads_once_and_goes_on(tmp_path):
    save_teacher(tmp_path / "teacher")
    teacher = AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    linearize(teacher, LizardConfig.preset("plain", attention={"window": 16})).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tmp_path / "teacher").save_pretrained(tmp_path / "model")
    book, state = tmp_path / "book.txt", tmp_path / "book.state"
    book.write_text("the first words of a book that goes on and on " * 8)
    run = ["generate", tmp_path / "model", "--device", "cpu"]
    result = call(*run, "--prompt-file", book, "-n", "0", "--save-state", state)
    assert "state saved" in result.stderr and result.stdout == ""
    loaded = call(*run, "--load-state", state, " and then", "-n", "6")
    whole = call(*run, book.read_text() + " and then", "-n", "6")
    assert whole.stdout.strip().endswith(loaded.stdout.strip())
    assert json.loads((tmp_path / "model" / "config.json").read_text())["lizard"]
    assert "give --save-state with it" in error(*run, "a", "-n", "0")
    assert "does not exist" in error(*run, "a", "--load-state", tmp_path / "none.state")


def test_a_device_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no file but a device or a pipe is there"):
        place_for(tmp_path / "pipe")
    with pytest.raises(ValueError, match="a folder is there"):
        place_for(tmp_path)
    (tmp_path / "old").write_text("1")
    assert place_for(tmp_path / "old") == tmp_path / "old"
