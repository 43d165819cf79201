"""Steps of training beside the teacher's: operations by formula against counted ones; the script on a tiny model."""

import json
import sys
from pathlib import Path

import pytest
import torch
import train_step
from model_flops import adapters, layer_of, of_a_step
from peft import LoraConfig, get_peft_model
from roofline import backward_operations, forward_operations, total
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.goals import reports
from lizard_models import LizardConfig

BATCH, LENGTH = 2, 12
SIZES = dict(vocab_size=30, hidden_size=24, intermediate_size=28, num_attention_heads=4, num_key_value_heads=2)
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def counted(model, train):
    """Operations as PyTorch counts them, with the pairs behind the causal mask."""
    ids = torch.ones(BATCH, LENGTH, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=ids, labels=ids).loss
        if train:
            loss.backward()
    return counter.get_total_flops()


def test_a_teachers_steps_against_counted_ones():
    config = LlamaConfig(**SIZES, num_hidden_layers=3, attn_implementation="eager")
    teacher = LlamaForCausalLM(config).requires_grad_(False)
    tokens, hidden, wide, narrow = BATCH * LENGTH, 24, 24, 12
    # 2 L H D (T + 1) of both products, where all T keys are 4 L H D T
    masked = tokens * 3 * wide * (4 * LENGTH - 2 * (LENGTH + 1))
    found = of_a_step("teacher forward", teacher, config, None, BATCH, LENGTH)
    assert found == counted(teacher, train=False) - masked

    adapted = get_peft_model(teacher, LoraConfig(r=2, target_modules=TARGETS))
    assert adapters(adapted) == 3 * 2 * (hidden + wide + 2 * (hidden + narrow) + wide + hidden + 3 * (hidden + 28))
    # nothing below the first layer learns, so its input has no gradient through q, k, v, nor through their adapters
    unneeded = 2 * tokens * (hidden * (wide + 2 * narrow) + 3 * 2 * hidden)
    found = of_a_step("teacher LoRA", adapted, config, None, BATCH, LENGTH)
    assert found - unneeded == counted(adapted, train=True) - 3 * masked


def test_a_students_steps_by_their_parts():
    config = LlamaConfig(**SIZES, num_hidden_layers=3)
    attention = LizardConfig.preset("plain").attention
    layer = layer_of(config, attention, BATCH * LENGTH)
    assert (layer.N, layer.H, layer.K, layer.D, layer.P, layer.W, layer.A) == (24, 4, 2, 6, 128, 128, 4)
    forward, tokens = total(forward_operations(layer)), BATCH * LENGTH
    gradients = total([t for t in backward_operations(layer) if t.what.startswith("gradients")])
    model = torch.nn.Linear(1, 1)  # without adapters
    of = [of_a_step(stage, model, config, attention, BATCH, LENGTH) for stage in train_step.STAGES]
    layers, head = 3 * 24 * (2 * 24 + 2 * 12 + 3 * 28), 30 * 24
    softmax = tokens * 2 * 3 * 24 * (LENGTH + 1)
    assert of[0] == 2 * tokens * (layers + head) + softmax
    assert of[3] == of[0] + 4 * tokens * (layers + head) + 3 * (forward + gradients)
    assert of[4] == of[3] - of[0]
    exact = total([t for t in forward_operations(layer) if t.formula == "2 * N * H * D * (W + A + E)"])
    output = 3 * 4 * tokens * 24 * 24  # the projection of the student's heads, and its gradient
    assert of[1] == 2 * tokens * layers + softmax + output + 3 * (forward + gradients - 2 * exact)


@pytest.fixture
def call(monkeypatch, tmp_path):
    out = tmp_path / "training" / "steps.json"

    def run(*given):
        tiny = ["--device", "cpu", "--shape", "tiny", "--layers", "1", "--steps", "1", "--warm-up", "0"]
        monkeypatch.setattr(sys, "argv", ["train_step.py", *tiny, *given, "--out", str(out)])
        train_step.main()
        return json.loads(out.read_text())["rows"]

    return run


def test_every_stage_is_a_row_and_rows_that_are_there_are_left(call, tmp_path, monkeypatch):
    first = call("--sizes", "1x24", "--stages", *train_step.STAGES, "--kinds", "plain", "graph")
    assert [row["stage"] for row in first] == list(train_step.STAGES)  # no graphs on a CPU
    assert all(row["ms"] > 0 and row["flops"] > 0 and "failed" not in row for row in first)
    assert first[3]["flops"] == first[0]["flops"] + first[4]["flops"]
    assert first[1]["flops"] > first[0]["flops"] and first[3]["flops"] > first[2]["flops"]

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train_step, "timed", full)
    second = call("--sizes", "1x24", "1x32", "--stages", "stage 1", "teacher LoRA", "--kinds", "plain", "checkpoint")
    assert second[: len(first)] == first
    rest = [(row["stage"], row["length"], row["kind"], row["failed"]) for row in second[len(first) :]]
    assert rest == [
        ("stage 1", 32, "plain", "out of memory"),
        ("teacher LoRA", 24, "checkpoint", "out of memory"),
        ("teacher LoRA", 32, "plain", "out of memory"),
        ("teacher LoRA", 32, "checkpoint", "out of memory"),
    ]
    whole = reports(tmp_path)[0]
    assert whole.arguments["shape"] == "tiny" and whole.command.count("train_step.py") == 2
    with pytest.raises(ValueError, match="--out .* is of another model; wanted tiny"):
        call("--layers", "2")


def test_a_stage_is_made_once_and_anew_after_a_row_that_failed(call, monkeypatch):
    made, original, timed = [], train_step.objective_of, train_step.timed
    monkeypatch.setattr(
        train_step, "objective_of", lambda stage, options: made.append(stage) or original(stage, options)
    )
    rows = call("--sizes", "1x24", "1x32", "--stages", "stage 2 CE", "teacher LoRA", "--kinds", "plain", "checkpoint")
    assert made == ["stage 2 CE", "teacher LoRA"] and not [row for row in rows if "failed" in row]

    def fails_once(*given):
        monkeypatch.setattr(train_step, "timed", timed)
        raise torch.OutOfMemoryError("CUDA out of memory")

    made.clear()
    monkeypatch.setattr(train_step, "timed", fails_once)
    rows = call("--sizes", "1x40", "1x48", "--stages", "stage 1", "--kinds", "plain")[-2:]
    assert [row.get("failed") for row in rows] == ["out of memory", None] and made == ["stage 1"] * 2


def test_stages_have_the_kinds_that_they_can_run_in():
    def kinds(stage):
        return [kind for kind in train_step.KINDS if train_step.is_offered(stage, kind)]

    assert kinds("teacher forward") == ["plain", "compile"]
    assert kinds("stage 1") == ["plain", "graph", "compile", "compile+graph"]
    assert kinds("teacher LoRA") == kinds("stage 2") == kinds("stage 2 CE") == list(train_step.KINDS)


def test_a_captured_teacher_attends_without_a_mask(monkeypatch):
    """transformers makes one of the whole square for a capture, and SDPA's fast kernels take none."""
    config = LlamaConfig(**SIZES, num_hidden_layers=1, attn_implementation="sdpa")
    objective = train_step.NextTokens(LlamaForCausalLM(config))
    ids, seen, attend = torch.randint(30, (1, 12)), [], torch.nn.functional.scaled_dot_product_attention

    def watched(*args, attn_mask=None, **kwargs):
        seen.append(None if attn_mask is None else attn_mask.shape[-2:])
        return attend(*args, attn_mask=attn_mask, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    plain = objective(ids)["loss"]
    monkeypatch.setattr("transformers.utils.import_utils.is_cuda_stream_capturing", lambda: True)
    with train_step.without_mask(objective, False):
        objective(ids)
    with train_step.without_mask(objective, True):
        loss = objective(ids)["loss"]
    assert seen == [None, (12, 12), None] and torch.equal(loss, plain)
    assert config._attn_implementation == "sdpa"


def test_times_of_kernels_are_read_from_the_trace():
    events = [
        {"cat": "kernel", "name": "a", "dur": 1500.0},
        {"cat": "kernel", "name": "a", "dur": 500.0},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "dur": 250.0},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 9.0},
        {"name": "process_name"},
    ]

    class Trace:
        def export_chrome_trace(self, path):
            Path(path).write_text(json.dumps({"traceEvents": events}))

    assert train_step.kernel_times(Trace()) == {"a": (2.0, 2), "Memcpy DtoD": (0.25, 1)}
