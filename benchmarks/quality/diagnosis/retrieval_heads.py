"""One layer alone: which of its heads the student misses, and whether form, size or merge is what they lack.

    python -m benchmarks.quality.diagnosis.retrieval_heads --layer 18 --data novels_train.npy \
        --eval-data novels_validation/ --out benchmarks/results/quality/diagnosis/retrieval_heads.json

The layer's inputs and attention outputs are read off the teacher once; every form then trains on them alone, in
float32, with the error and the rates of stage 1. Of the first form two oracles are measured as well: the trained
student with the teacher's share of the mass outside window and anchors ("share"), and with the teacher's output there
("output"). The file in results/ has forms and a divergence of attention weights as well that the library has no more
(commit a286720; docs/diary.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lizard_layers import AttentionConfig, HybridAttention
from lizard_models import LizardConfig
from lizard_models.distill.schedule import cosine_schedule
from lizard_models.distill.trainer import parameter_groups
from lizard_models.files.environment import environment
from lizard_models.model.layer_loss import output_error
from lizard_models.teachers.find import load_teacher
from lizard_models.text.sequences import load_documents, load_sequences
from lizard_ops import apply_rotary, window_attn

FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "four times the features": {"feature_dim": 512},
    "a key map a query head": {"key_map": "query_head"},
}


class Layer:
    """A teacher's attention layer: its projections, and what it read and put out."""

    def __init__(self, model: Any, index: int) -> None:
        self.attention = model.model.layers[index].self_attn
        self.config = model.config
        self.rope: tuple[Tensor, Tensor] | None = None

    @torch.no_grad()
    def read(self, model: Any, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Inputs [1, T, d] and outputs before the projection [1, T, H, D], a pair a row."""
        seen: list[Tensor] = []

        def note(module: Any, inputs: tuple, named: dict[str, Any]) -> None:
            seen.append(named["hidden_states"].clone())
            self.rope = named["position_embeddings"]

        hooks = [
            self.attention.register_forward_pre_hook(note, with_kwargs=True),
            self.attention.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone())),
        ]
        for row in tokens:
            model.model(row.unsqueeze(0))
        for hook in hooks:
            hook.remove()
        outputs = (o.unflatten(-1, (self.config.num_attention_heads, -1)) for o in seen[1::2])
        return list(zip(seen[::2], outputs, strict=True))

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        projections = (self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        return tuple(p(x).unflatten(-1, (-1, self.attention.head_dim)) for p in projections)  # type: ignore[return-value]

    def run(self, layer: HybridAttention, x: Tensor) -> Tensor:
        cos, sin = self.rope  # type: ignore[misc]
        return layer(x, *self.heads(x), (cos[:, : x.shape[1]], sin[:, : x.shape[1]]))[0]

    def outside(self, x: Tensor, window: int, anchors: int) -> dict[str, Tensor]:
        """Of the teacher: mass on keys outside window and anchors [T, H] and its largest part [T, H], the output of
        these keys and that of the others [1, T, H, D]."""
        cos, sin = self.rope  # type: ignore[misc]
        q, k, v = self.heads(x)
        q, k = (apply_rotary(h, cos[:, : x.shape[1]], sin[:, : x.shape[1]]) for h in (q, k))
        group = q.shape[2] // k.shape[2]
        scores = torch.einsum("bthd,bshd->bhts", q, k.repeat_interleave(group, 2)) * self.attention.head_dim**-0.5
        i, j = torch.arange(x.shape[1]).unsqueeze(1), torch.arange(x.shape[1])
        share = scores.masked_fill(j > i, -math.inf).softmax(-1) * ((j <= i - window) & (j >= anchors))
        mass = share.sum(-1)
        o = torch.einsum("bhts,bshd->bthd", share, v.repeat_interleave(group, 2))
        return {
            "mass": mass[0].T,
            "largest": share.amax(-1)[0].T,
            "output": o / mass.transpose(1, 2).unsqueeze(-1).clamp_min(1e-12),
            "inside": window_attn(q, k, v, window, anchors=anchors)[0],
        }


def build(layer: Layer, **changes: Any) -> HybridAttention:
    choices = LizardConfig.preset("plain").attention
    choices = dataclasses.replace(
        choices, **{"positions": "true", "position_limit": None, "position_step": None, **changes}
    )
    config = layer.config
    shape = {"hidden_size": config.hidden_size, "head_dim": layer.attention.head_dim}
    shape |= {"num_heads": config.num_attention_heads, "num_key_heads": config.num_key_value_heads}
    return HybridAttention(AttentionConfig.from_choices(choices, **shape))


def train(layer: Layer, student: HybridAttention, pairs: list[tuple[Tensor, Tensor]], steps: int) -> None:
    """Relative error after the output projection, a row a step, with the rates and the schedule of stage 1."""
    recipe = LizardConfig.preset("plain").stage1
    named = torch.nn.ModuleDict({"attention": torch.nn.ModuleDict({"lizard": student})})  # as rates are told apart
    groups = parameter_groups(named, recipe.learning_rate, recipe.gate_learning_rate)
    optimizer = torch.optim.AdamW(groups, betas=recipe.betas, eps=recipe.eps, weight_decay=recipe.weight_decay)
    schedule = cosine_schedule(optimizer, steps, recipe.warmup_ratio, recipe.min_learning_rate_ratio)
    for step in range(steps):
        x, o = pairs[step % len(pairs)]
        wanted, got = (layer.attention.o_proj(h.flatten(2)).unsqueeze(2) for h in (o, layer.run(student, x)))
        output_error(got, wanted, "relative").backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


@torch.no_grad()
def errors(outputs: list[tuple[Tensor, Tensor]]) -> list[float]:
    """Squared error over squared target a head, of pairs of what came and what was wanted."""
    wrong = sum((got - o).square().sum((0, 1, 3)) for got, o in outputs)
    return (wrong / sum(o.square().sum((0, 1, 3)) for _, o in outputs)).tolist()  # type: ignore[union-attr,operator]


@torch.no_grad()
def oracles(layer: Layer, student: HybridAttention, pairs: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """Errors of the student with the teacher's share, and with the teacher's output outside."""
    config = student.config
    found: dict[str, list[tuple[Tensor, Tensor]]] = {"share": [], "output": []}
    for x, o in pairs:
        teacher, got = layer.outside(x, config.window, config.anchors), layer.run(student, x)
        hook = student.mix.register_forward_hook(lambda mix, inputs, out: {"merge_bias": out["merge_bias"] + 1e4})
        linear = layer.run(student, x)  # all the weight on the linear branch
        hook.remove()
        inside, mass = teacher["inside"], teacher["mass"].unsqueeze(0).unsqueeze(-1)
        along = linear - inside
        share = ((got - inside) * along).sum(-1, keepdim=True) / along.square().sum(-1, keepdim=True).clamp_min(1e-12)
        found["share"].append((mass * linear + (1 - mass) * inside, o))
        found["output"].append((share * teacher["output"] + (1 - share) * inside, o))
    return {name: errors(outputs) for name, outputs in found.items()}


@torch.no_grad()
def mass_of(layer: Layer, pairs: list[tuple[Tensor, Tensor]], config: AttentionConfig) -> dict[str, list[float]]:
    """A head: the mean mass outside, the part of it on one key, and the mass outside in the twentieth of the rows with
    the largest outputs."""
    masses, largest, sizes = [], [], []
    for x, o in pairs:
        seen = layer.outside(x, config.window, config.anchors)
        masses.append(seen["mass"])
        largest.append(seen["largest"])
        sizes.append(o[0].norm(dim=-1))
    mass, top, size = torch.cat(masses), torch.cat(largest), torch.cat(sizes)
    rows = size.topk(len(size) // 20, 0).indices
    return {
        "outside": mass.mean(0).tolist(),
        "on one key": (top.sum(0) / mass.sum(0)).tolist(),
        "outside in the largest rows": mass.gather(0, rows).mean(0).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layer", type=int, default=18)
    parser.add_argument("--teacher", default="smollm2-135m")
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--eval-data", nargs="+", required=True)
    parser.add_argument("--sequences", type=int, default=64, help="training sequences of 1024 tokens")
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    torch.manual_seed(0)
    teacher = load_teacher(options.teacher)
    model, layer = teacher.model, Layer(teacher.model, options.layer)
    model.requires_grad_(False)
    sequences = load_sequences(options.data, teacher.tokenizer, 1024, vocab_size=model.config.vocab_size)
    tokens = torch.stack([sequences[i]["input_ids"] for i in range(options.sequences)])
    pairs = layer.read(model, tokens)
    held_out = layer.read(model, load_documents(options.eval_data, teacher.tokenizer, 1024, count=8).tokens)
    settings = vars(options) | {name: [Path(s).name for s in getattr(options, name)] for name in ("data", "eval_data")}
    del settings["out"]
    results: dict[str, Any] = {"environment": environment(), "settings": settings, "forms": {}}
    results["mass"] = mass_of(layer, held_out, build(layer).config)
    for name, changes in FORMS.items():
        started, student = time.monotonic(), build(layer, **changes)
        train(layer, student, pairs, options.steps)
        results["forms"][name] = errors([(layer.run(student, x), o) for x, o in held_out])
        if name == "plain":
            results["oracles"] = oracles(layer, student, held_out)
        shown = " ".join(f"{error:.3f}" for error in results["forms"][name])
        print(f"{name}: {shown} in {time.monotonic() - started:.0f} s", flush=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    for group in ("mass", "oracles"):
        for name, values in results[group].items():
            print(f"{group}, {name}: {' '.join(f'{value:.3f}' for value in values)}")


if __name__ == "__main__":
    main()
