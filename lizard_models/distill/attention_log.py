"""What the converted layers do while they train: gates, share of the linear branch, error. Read now and then."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from lizard_layers import HybridAttention
from lizard_models.distill.log import LogFile
from lizard_models.model.attention import LizardAttention
from lizard_ops import apply_rotary, window_attn

SATURATED = 0.999  # a gate above remembers a thousand tokens and more, and has a slope of a thousandth
LONGEST = 1e9  # tokens; a gate of exactly 1 would remember for ever
ONE_BRANCH = 1e3  # a bias of the merge that leaves one branch alone
TINY = torch.finfo(torch.float32).tiny


@dataclass
class LayerReading:
    """One converted layer on one sequence."""

    layer: int
    memory: list[float]
    """Median over tokens (and features, of a gate per channel) of 1 / (1 - gate), in tokens, for each head of the
    gate, at most ``LONGEST``; empty without a gate."""
    saturated: float | None
    """Share of gates above ``SATURATED``."""
    linear_share: list[float]
    """For each query head, the mean over tokens that have linear keys of: with mix="merge" the weight of the linear
    branch, with "sum" |o_lin| / (|o_lin| + |alpha o_win|). Empty where there are no such tokens."""
    error: float
    """Squared error of the heads against softmax attention of the same projections on the same stream, over squared
    softmax attention, mean over heads. In stage 1 that attention is the teacher's; in stage 2 it has the adapters."""


class AttentionLog(TrainerCallback):
    """Every ``every`` steps, and before the first, reads the layers of ``objective`` on ``row`` [1, T].

    Every process must have one. The line in the log has ``event``: "attention", ``layers``, and by layer ``memory``,
    ``saturated``, ``linear_share``, ``error``; Trainer's reports get the ``summary``.
    """

    trainer: Any

    def __init__(self, log: LogFile, every: int, objective: nn.Module, row: Tensor) -> None:
        self.log, self.every, self.objective, self.row = log, every, objective, row

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._read(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self._read(args, state, control)

    def _read(self, args: Any, state: Any, control: Any) -> None:
        found = read_attention(self.objective, self.row.to(args.device))
        if not found:
            return
        columns = {
            name: [getattr(one, name) for one in found] for name in ("memory", "saturated", "linear_share", "error")
        }
        self.log.write(event="attention", step=state.global_step, layers=[one.layer for one in found], **columns)
        due = control.should_log  # which an entry of the log clears
        self.trainer.log(summary(found))
        control.should_log = due


def summary(found: list[LayerReading]) -> dict[str, float]:
    """One number for all layers, and the error of each::

    attention/error, attention/saturated, attention/linear_share    means
    attention/memory                                                median of the heads' medians
    attention/error_layer_3                                         of layer 3
    """
    memory = [tokens for one in found for tokens in one.memory]
    saturated = [one.saturated for one in found if one.saturated is not None]
    share = [part for one in found for part in one.linear_share]
    values = {"attention/error": mean(one.error for one in found)}
    values |= {"attention/memory": median(memory)} if memory else {}
    values |= {"attention/saturated": mean(saturated)} if saturated else {}
    values |= {"attention/linear_share": mean(share)} if share else {}
    return values | {f"attention/error_layer_{one.layer}": one.error for one in found}


@torch.no_grad()
def read_attention(objective: nn.Module, row: Tensor) -> list[LayerReading]:
    """The converted layers of a training objective in one more forward of ``row`` [1, T], without dropout.

    Whatever the objective computes is computed; nothing of it changes, random numbers neither. In float32.
    """
    attentions = [m for m in objective.modules() if isinstance(m, LizardAttention)]
    found: dict[int, LayerReading] = {}
    training = objective.training
    with ExitStack() as hooks:
        for attention in attentions:
            hook = attention.lizard.register_forward_pre_hook(_reader(attention, found), with_kwargs=True)
            hooks.callback(hook.remove)
        objective.eval()
        try:
            objective(input_ids=row)
        finally:
            objective.train(training)
    return [found[layer] for layer in sorted(found)]


def _reader(attention: LizardAttention, found: dict[int, LayerReading]) -> Any:
    def read(lizard: HybridAttention, arguments: tuple, options: dict[str, Any]) -> None:
        x, q, k, v, rope, *_ = (*arguments, None)
        q, k, v = q.float(), k.float(), v.float()
        rope = None if rope is None else tuple(t.float() for t in rope)
        inputs = (x, q, k, v, rope)
        options = {name: options[name] for name in ("anchor_blocks",) if name in options}
        o = lizard.forward(*inputs, **options)[0].float()  # not through hooks
        target = _softmax(attention, q, k, v, rope).float()
        errors, squares = (t.square().sum((0, 1, 3)) for t in (o - target, target))
        memory, saturated = _gates(lizard, x, k)
        found[attention.layer_idx] = LayerReading(
            attention.layer_idx,
            memory,
            saturated,
            linear_share(lizard, o, *inputs, **options),
            (errors / squares.clamp(min=TINY)).mean().item(),
        )

    return read


def _gates(lizard: HybridAttention, x: Tensor, k: Tensor) -> tuple[list[float], float | None]:
    if not lizard.config.linear_branch or lizard.gate is None:
        return [], None
    g = lizard.gate(x, k).float()  # [B, T, H] or [B, T, H, F]
    lengths = (1 / -torch.expm1(g)).clamp(max=LONGEST)
    medians = lengths.movedim(2, 0).flatten(1).median(1).values
    return medians.tolist(), (g.exp() > SATURATED).float().mean().item()


def linear_share(lizard: HybridAttention, o: Tensor, *inputs: Any, **options: Any) -> list[float]:
    """``LayerReading.linear_share`` of a layer whose output for ``inputs`` is ``o`` [B, T, Hq, D] float32.

    Outputs with other mixes say it, whatever form the op takes: o lies between o_win and o_lin, the share says where.
    """
    config = lizard.config
    if not config.linear_branch:
        return []

    def with_mix(**mix: Any) -> Tensor:
        hook = lizard.mix.register_forward_hook(lambda module, given, made: mix)
        try:
            return lizard.forward(*inputs, **options)[0].float()
        finally:
            hook.remove()

    if config.mix == "merge":
        bias = torch.full((config.num_heads,), ONE_BRANCH, device=o.device)
        window, linear = with_mix(merge_bias=-bias), with_mix(merge_bias=bias)
        way = linear - window
        length = way.square().sum(-1)
        share = ((o - window) * way).sum(-1) / length.clamp(min=TINY)
        there = length > 1e-10 * o.square().sum(-1)
    else:
        linear = with_mix(alpha=0.0)
        lengths = linear.norm(dim=-1), (o - linear).norm(dim=-1)
        share = lengths[0] / (lengths[0] + lengths[1]).clamp(min=TINY)
        there = lengths[0] > 0
    if not there.any():
        return []
    counts = there.sum((0, 1)).clamp(min=1)
    return ((share.clamp(0, 1) * there).sum((0, 1)) / counts).tolist()


def _softmax(attention: LizardAttention, q: Tensor, k: Tensor, v: Tensor, rope: Any) -> Tensor:
    """The family's attention [B, T, Hq, D]: causal, of its window if it has one."""
    length, window = q.shape[1], attention.teacher_window
    seen = length if window is None else min(window, length)
    if attention.config._attn_implementation == "sdpa" and seen == length and attention.softcap is None:
        return attention.teacher_attention(q, k, v, rope)
    q, k = (q, k) if rope is None else (apply_rotary(q, *rope), apply_rotary(k, *rope))
    return window_attn(q, k, v, seen, scale=attention.scaling, softcap=attention.softcap)[0]
