"""Readings of gates, linear share and error while a stage trains, against their formulas; speed and model-flops use."""

import dataclasses
import json

import pytest
import torch
from tiny import student, tokens
from torch.utils.flop_counter import FlopCounterMode
from training import Sequences, arguments, fresh, moved, recipes, snapshot

from lizard_layers import hybrid_attention
from lizard_models.distill import attention_log, speed, train_stage1, train_stage2
from lizard_models.distill.attention_log import read_attention
from lizard_models.distill.stage1 import AttentionTransfer
from lizard_models.evaluation import attention_errors
from lizard_models.model.arithmetic import Shape
from lizard_models.recipes import Stage1Config
from lizard_ops.gated_attn.formula import gated_formula
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, hybrid_arguments, linear_inputs
from lizard_ops.hybrid_attn.formula import phi
from lizard_ops.window_attn.formula import window_formula


def read(model, ids):
    model.set_attention_mode("distill", Stage1Config(error="relative"))
    return read_attention(AttentionTransfer(model), ids)


def branches(monkeypatch, model, ids):
    """Of every layer: weights of the linear branch [T, Hq] by the formula of all pairs, and both outputs."""
    plain, found = hybrid_attention.chunk_hybrid_attn, []

    def kept(q, k, v, fq, fk, g, window, **choices):
        tensors = {name: choices[name] for name in ("sinks", "alpha", "merge_bias") if name in choices}
        names = ("mix", "anchors", "coverage", "feature_map", "normalize", "scale", "softcap", "feature_scale")
        x, options = hybrid_arguments(
            HybridInputs(q=q, k=k, v=v, fq=fq, fk=fk, g=g, **tensors),
            HybridOptions(window=window, **{name: choices[name] for name in names}),
        )
        linear = linear_inputs(x, options)._replace(q=phi(x.fq, options.feature_map), k=phi(x.fk, options.feature_map))
        o_lin, log_mass = gated_formula(linear, options.linear)
        o_win, lse, row_max = window_formula(x.local, options.local)
        if options.mix == "sum":
            sizes = o_lin.norm(dim=-1), (x.alpha.unsqueeze(-1) * o_win).norm(dim=-1)
            share, there = sizes[0] / (sizes[0] + sizes[1]), sizes[0] > 0
        else:
            share, there = torch.sigmoid(log_mass - (lse - row_max) + x.merge_bias), log_mass > -torch.inf
        found.append((share.nan_to_num(0) * there).sum((0, 1)) / there.sum((0, 1)))
        return plain(q, k, v, fq, fk, g, window, **choices)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(hybrid_attention, "chunk_hybrid_attn", kept)
        patched.setattr(hybrid_attention, "read_text", lambda *_: None)  # the ops one by one
        model.set_attention_mode("distill", Stage1Config(error="relative"))
        model(input_ids=ids)
    return found


@pytest.mark.parametrize(
    ("preset", "family", "changes"),
    [("plain", "llama", {}), ("plain", "gemma2", {"keep_sliding_layers": False}), ("paper", "llama", {})],
)
def test_every_reading_is_its_formula(monkeypatch, preset, family, changes):
    model, ids = student(preset, family, **changes), tokens(1, 60)
    errors = attention_errors(model, ids).per_head().mean(1)
    shares = branches(monkeypatch, model, ids)
    found = read(model, ids)
    assert [one.layer for one in found] == [a.layer_idx for a in model.lizard_attentions()]
    assert [one.error for one in found] == pytest.approx(errors.tolist(), rel=1e-3)
    for one, share in zip(found, shares, strict=True):
        assert one.linear_share == pytest.approx(share.tolist(), abs=2e-3)
        assert 0.01 < min(one.linear_share) < 0.99


def test_memory_is_that_of_the_gate_and_saturation_is_seen():
    model, ids = fresh(attention={"gate": "key_head", "gate_init": 0.98}), tokens(1, 40)
    for one in read(model, ids):
        assert one.memory == pytest.approx([50.0, 50.0], rel=1e-3) and one.saturated == 0
    with torch.no_grad():
        model.lizard_attentions()[1].lizard.gate.bias[1] = 40.0
    found = read(model, ids)
    assert found[1].memory[1] == attention_log.LONGEST and found[1].saturated == 0.5 and found[0].saturated == 0
    assert [one.memory for one in read(student("window_only"), ids)] == [[], [], []]


def test_short_rows_have_no_linear_share():
    assert all(one.linear_share == [] for one in read(fresh(), tokens(1, 8)))


@pytest.mark.parametrize("stage", [1, 2])
def test_a_run_that_is_looked_at_is_the_same_run(tmp_path, stage):
    states = []
    for every in (0, 2):
        model = fresh()
        run = dataclasses.replace(arguments(tmp_path / str(every)), log=tmp_path / f"{every}.jsonl")
        run = dataclasses.replace(run, log_attention_every=every, peak_tflops=0.001)
        recipe = recipes(model, steps=4)[stage - 1]
        if stage == 1:
            train_stage1(model, Sequences(), run, recipe)
        else:
            model, _ = train_stage2(
                model, Sequences(), run, dataclasses.replace(recipe, kl_weight=1.0, lora_dropout=0.1)
            )
        states.append((snapshot(model), model))
    assert moved(states[0][0], states[1][1]) == set()
    losses = [[e["loss"] for e in map(json.loads, (tmp_path / f"{n}.jsonl").open()) if "loss" in e] for n in (0, 2)]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    lines = [json.loads(line) for line in (tmp_path / "2.jsonl").read_text().splitlines()]
    seen = [line for line in lines if line.get("event") == "attention"]
    assert [line["step"] for line in seen] == [0, 2, 4] and seen[0]["layers"] == [0, 1, 2]
    assert all(len(line[name]) == 3 for line in seen for name in ("memory", "saturated", "linear_share", "error"))
    history = json.loads((tmp_path / "2" / "checkpoint-4" / "trainer_state.json").read_text())["log_history"]
    told = [entry for entry in history if "attention/error" in entry]
    assert [entry["attention/error_layer_1"] for entry in told] == [line["error"][1] for line in seen]
    assert not any(line.get("event") == "attention" for line in map(json.loads, (tmp_path / "0.jsonl").open()))
    recipe = dataclasses.replace(recipe, **({"kl_weight": 1.0} if stage == 2 else {}))
    flop = Shape(model.config).stage_flop(f"stage{stage}", recipe)
    entries = [line for line in lines if "loss" in line]
    speeds = [entry["tokens_per_second"] for entry in entries]
    assert [entry["model_flops_use"] for entry in entries] == pytest.approx([s * flop / 1e9 for s in speeds])


def test_without_a_peak_there_is_no_use(tmp_path):
    model = fresh()
    train_stage1(
        model, Sequences(), dataclasses.replace(arguments(tmp_path / "run"), log=tmp_path / "log"), recipes(model, 1)[0]
    )
    (entry,) = (line for line in map(json.loads, (tmp_path / "log").open()) if "loss" in line)
    assert "model_flops_use" not in entry and entry["tokens_per_second"] > 0


def test_flop_are_those_that_torch_counts():
    """Of what both count: projections, MLPs, head, and the whole square of scores, of which half is causal."""
    model, ids = student(), tokens(1, 64)
    model.set_attention_mode("teacher")
    model.set_attn_implementation("eager")
    shape = Shape(model.config)
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model.model(input_ids=ids)
    causal = shape.teacher_flop(64) - shape.dense_without_head
    assert counted.get_total_flops() / 64 == shape.dense_without_head + 2 * causal
    with FlopCounterMode(display=False) as counted, torch.no_grad():
        model(input_ids=ids)
    assert counted.get_total_flops() / 64 == shape.dense + 2 * causal


def test_peaks_are_found_by_the_word_and_only_there():
    names = {
        "NVIDIA H200": 989.0,
        "NVIDIA H100 80GB HBM3": 989.0,
        "NVIDIA H100 PCIe": 756.0,
        "NVIDIA A100-SXM4-80GB": 312.0,
        "NVIDIA A10": 125.0,
        "NVIDIA A10G": None,
        "NVIDIA L40": None,
        "NVIDIA GeForce RTX 4090": None,
    }
    assert {name: speed.known_peak(name) for name in names} == names
    assert speed.peak_of(torch.device("cpu"), torch.bfloat16) is None


@pytest.mark.parametrize("changes", [{"peak_tflops": 0.0}, {"peak_tflops": float("nan")}, {"log_attention_every": -1}])
def test_numbers_that_mean_nothing_are_refused(tmp_path, changes):
    model = fresh()
    with pytest.raises(ValueError, match=next(iter(changes))):
        train_stage1(model, Sequences(), dataclasses.replace(arguments(tmp_path / "run"), **changes), recipes(model)[0])
