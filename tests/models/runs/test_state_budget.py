"""Runs with a budget for the state: places where they save most, the same when a run goes on, and what is refused."""

import json

import pytest
import torch
import yaml
from cli_calls import call, error
from readable import save_teacher, save_texts
from tiny import student, teacher
from transformers import AutoConfig, AutoModelForCausalLM

from lizard_models import LizardConfig
from lizard_models.evaluation.place_errors import LEVELS
from lizard_models.evaluation.share_places import share_places
from lizard_models.model.layer_configs import kept_by_layer
from lizard_models.model.linearize import student_config
from lizard_models.runs import linearize_run, state_budget
from lizard_models.runs.memory import constant_bytes, kept_bytes, lizard_bytes, told_places
from lizard_models.runs.plan import work_folder
from lizard_models.runs.recipe_file import read_recipe
from lizard_models.runs.state_budget import evenly_kept, places_within, prices, shared_mib

WINDOW = {"window": 16, "score_dim": 8}
SMALL = ["--set", "attention.window=16", "--set", "attention.score_dim=8", "--set", "stage0.sequence_length=160",
         "--set", "stage0.label_queries=32", "--stage0-steps", "2", "--stage1-steps", "1", "--stage2-steps", "1",
         "--seq-len", "64", "--batch-size", "2", "--device", "cpu"]  # fmt: skip
PLAIN = [*SMALL, "--preset", "plain"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    save_teacher(folder / "teacher")
    save_texts(folder / "texts")
    return folder


def test_prices_are_differences_of_states():
    """Of models with other numbers of kept keys in single heads."""
    for attention in (WINDOW, WINDOW | {"score_received": True, "gate": "channel", "key_map": "query_head"}):
        config = student(attention=attention).config
        paid = prices(config)

        def size(*places, attention=attention):
            return lizard_bytes(student(attention=attention | {"kept_keys": places}).config, 0, torch.float32)

        none, first = [[0, 0]] * 3, [[24, 0], [0, 0], [0, 0]]
        assert paid.without == lizard_bytes(config, 10**6, torch.float32) == constant_bytes(config, torch.float32)
        assert size(*first) - size(*none) == 24 * paid.places[0] + paid.layers[0]
        assert size([3, 1], [0, 0], [0, 5]) - size(*none) == 9 * paid.places[0] + paid.layers[0] + paid.layers[2]


def test_windows_of_sliding_layers_are_counted_and_softmax_layers_are_not():
    sliding = student(family="gemma3_text", attention=WINDOW).config
    assert constant_bytes(sliding, torch.float32) == lizard_bytes(sliding, 10**6, torch.float32)
    softmax = student(softmax_layers=(1,), attention=WINDOW).config
    assert constant_bytes(softmax, torch.float32) == lizard_bytes(softmax, 0, torch.float32)


def test_an_even_start_fills_the_budget():
    config, mib = LizardConfig.preset("plain", attention=WINDOW), 0.3
    even = evenly_kept(teacher().config, config, mib).attention.kept_keys
    fits = [
        lizard_bytes(student(attention=WINDOW | {"kept_keys": n}).config, 0, torch.float32) for n in (even, even + 1)
    ]
    assert fits[0] <= mib * 2**20 < fits[1]


def test_places_fill_the_budget_and_leave_softmax_layers_out():
    config = student(attention=WINDOW | {"kept_keys": 1}, softmax_layers=(1,)).config
    errors = torch.linspace(1, 0, len(LEVELS), dtype=torch.float64) * torch.tensor([[1.0, 9.0], [0.2, 0.0]])[..., None]
    mib = (prices(config).without + prices(config).layers[0] + 40 * prices(config).places[0]) / 2**20
    assert places_within(config, errors, mib) == [[0, 40], [], [0, 0]]
    assert places_within(config, errors, 1000.0) == [[4096, 4096], [], [4096, 0]]


def test_a_run_shares_places_out_once_and_goes_on_with_them(world, tmp_path, monkeypatch):
    out, mib = tmp_path / "out", 0.4
    command = ["linearize", world / "teacher", "--data", world / "texts", *PLAIN, "--out", out, "--state-mib", mib]

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(linearize_run, "train_stage1", stop)
        first = call(*command, code=130).stdout
    chosen = json.loads((work_folder(out) / "kept_keys.json").read_text())
    places, errors, levels = chosen["places"], chosen["errors"], chosen["levels"]
    assert "of a run with other config, --state-mib;" in error(*command[:-1], 0.5, "--resume")
    with monkeypatch.context() as resumed:
        resumed.setattr(state_budget, "place_errors", lambda *args, **kwargs: pytest.fail("measured again"))
        output = call(*command, "--resume").output

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert [list(heads) for heads in kept_by_layer(model.config)] == places
    size = lizard_bytes(model.config, 0, torch.float32)
    assert size <= mib * 2**20 and len({n for heads in places for n in heads}) > 1
    paid = prices(model.config)
    shared = share_places(errors, levels, int(mib * 2**20) - paid.without, paid.places, paid.layers)
    assert [tuple(heads) for heads in places] == shared
    for text in (first, output):
        assert f"the state takes {size / 2**20:.2f} of 0.4 MiB (float32 keys)" in text
        assert all(f"  layer {i}: {' '.join(map(str, heads))}" in text for i, heads in enumerate(places))
    training = json.loads((out / "training.json").read_text())
    assert training["state_mib"] == mib and training["config"]["attention"]["kept_keys"] == places
    assert json.loads((out / "evaluation.json").read_text())["settings"]["state_mib"] == mib
    card, info = (out / "README.md").read_text(), call("info", out).output
    assert f"kept keys take {kept_bytes(model.config, torch.float32):,}" in card
    assert "; ".join(f"layer {i}: {' '.join(map(str, heads))}" for i, heads in enumerate(places)) in card
    assert f"kept keys: {told_places(model.config)}" in info.replace("\n", " ")
    assert call("generate", out, "the wind", "-n", "3", "--device", "cpu").stdout.startswith("the wind")
    assert AutoConfig.from_pretrained(out).lizard == model.config.lizard
    assert "finished before" in call(*command, "--resume", "auto").output
    assert "exists already" in error(*command[:-1], 0.5, "--resume", "auto")


def test_the_recommended_recipe_shares_out_the_bytes_of_even_places(world, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    command = ["linearize", world / "teacher", "--data", world / "texts", *SMALL, "--out", out, "--kept-keys"]
    with monkeypatch.context() as stopped:
        stopped.setattr(linearize_run, "train_stage1", stop)
        told = call(*command, 6, code=130).stdout
    even = student("recommended", attention=WINDOW | {"kept_keys": 6}).config
    chosen = json.loads((work_folder(out) / "kept_keys.json").read_text())
    paid = prices(even)
    left = constant_bytes(even, torch.float32) - paid.without
    shared = share_places(chosen["errors"], chosen["levels"], left, paid.places, paid.layers)
    assert [tuple(heads) for heads in chosen["places"]] == shared and len({n for heads in shared for n in heads}) > 1
    assert f"of {constant_bytes(even, torch.float32) / 2**20:.4g} MiB (float32 keys)" in told
    assert "of a run with other config; repeat" in error(*command, 7, "--resume")
    call(*command, 6, "--resume")
    training = json.loads((out / "training.json").read_text())
    assert training["config"]["attention"]["kept_keys"] == chosen["places"] and training["kept_keys"] == 6
    assert "finished before" in call(*command, 6, "--resume", "auto").output
    assert "exists already" in error(*command, 7, "--resume", "auto")


def test_places_are_shared_only_where_a_recipe_says_so():
    def told(kept_keys, share, scored=True, state_mib=None):
        choices = {"attention": WINDOW | {"kept_keys": kept_keys}, "stage0": {"share_places": share}}
        config = student_config(teacher().config, LizardConfig.preset("plain", **choices))
        return shared_mib(config, state_mib, scored), constant_bytes(config, torch.float32) / 2**20

    wanted, even = told(6, True)
    assert wanted == even
    assert told(6, True, state_mib=2.0)[0] == 2.0
    assert [told(6, False)[0], told(0, True)[0], told([6, 2], True)[0], told(6, True, False)[0]] == [None] * 4


def test_lists_come_from_the_command_line_too(world, tmp_path):
    by_layer = "attention.kept_keys=[[5, 0], [0, 0], [2, 7]]"
    call("convert", world / "teacher", "--out", tmp_path / "model", "--set", "attention.window=16", "--set", by_layer)
    info = call("info", tmp_path / "model").output.replace("\n", " ")
    assert "kept keys: 0 to 7 of a key head, 14 in all, in 2 of 3 linearized layers" in info
    assert call("generate", tmp_path / "model", "the wind", "-n", "3", "--device", "cpu").stdout.startswith("the wind")
    wrong = ["--out", tmp_path / "wrong", "--set", "attention.kept_keys=[[5, 0]]"]
    assert "kept_keys has lists for 1 layers, but the model has 3" in error("convert", world / "teacher", *wrong)


def test_a_budget_takes_the_place_of_the_presets_kept_keys(world, tmp_path):
    """On the command line and in a file, which may not name both."""
    command = ["linearize", world / "teacher", "--data", world / "texts", *SMALL, "--state-mib", 0.4, "--out"]
    shown = yaml.safe_load(call(*command, tmp_path / "out", "--show-recipe").stdout)
    assert (shown["preset"], shown["budget"]["state_mib"], shown["budget"]["kept_keys"]) == ("recommended", 0.4, 0)
    assert "GiB" in call(*command, tmp_path / "out", "--dry-run").stdout
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(shown | {"budget": shown["budget"] | {"kept_keys": 480}}))
    both = error("run", path)
    assert "budget.state_mib: got kept_keys=480 as well, wanted one of the two" in both and "kept_keys=0 leaves" in both
    del shown["budget"]["kept_keys"]
    path.write_text(yaml.safe_dump(shown))
    plan, wanted = read_recipe(path), LizardConfig.preset("recommended", attention=WINDOW | {"kept_keys": 0})
    assert plan.config.attention == wanted.attention and plan.state_mib == 0.4
    assert evenly_kept(teacher().config, plan.config, 0.4).attention.kept_keys > 1


def test_what_does_not_fit_is_refused_by_name(world, tmp_path):
    out = tmp_path / "out"
    command = ["linearize", world / "teacher", "--data", world / "texts", *PLAIN, "--out", out, "--state-mib"]
    without = prices(student(attention=WINDOW).config).without / 2**20
    for planned in ([], ["--dry-run"]):
        assert f"--state-mib: got 0.01, wanted more than the {without:.2f} MiB" in error(*command, "0.01", *planned)
        assert "--state-mib: got kept_keys=4 as well" in error(*command, "1", "--kept-keys", "4", *planned)
    assert "--state-mib: keys are shared out by the scores of stage 0" in error(*command, "1", "--stage0-steps", "0")
    assert not out.exists()
    assert "GiB" in call(*command, "1", "--dry-run").stdout
