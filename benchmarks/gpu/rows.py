"""What is timed: ours and what others offer for the same work, each a function of ``LayerInputs``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from shapes import ANCHORS, WINDOW, LayerInputs, pre_activations, two_sided_softmax
from torch import Tensor

import lizard_ops

Run = Callable[[LayerInputs], Tensor]


@dataclass(frozen=True)
class Row:
    """One line of the table. ``group`` rows do the same work; goals in milliseconds, None where there is none."""

    group: str
    name: str
    run: Run
    forward_goal: float | None = None
    training_goal: float | None = None


def gated_scalar(x: LayerInputs) -> Tensor:
    return lizard_ops.chunk_gated_attn(x.phi_q, x.phi_k, x.v, x.g)[0]


def gated_channel(x: LayerInputs) -> Tensor:
    return lizard_ops.chunk_gated_attn(x.phi_q, x.phi_k, x.v, x.g_channel)[0]


def window(x: LayerInputs) -> Tensor:
    return lizard_ops.window_attn(x.q, x.k, x.v, WINDOW, anchors=ANCHORS, sinks=x.sinks)[0]


def layer(x: LayerInputs, **choices) -> Tensor:
    (q, fq), (k, fk) = (
        lizard_ops.project_heads(heads, weight, reuse_gradient=True)
        for heads, weight in ((x.q, x.q_map), (x.k, x.k_map))
    )
    o, _ = lizard_ops.chunk_hybrid_attn(
        q, k, x.v, fq, fk, x.g, WINDOW, anchors=ANCHORS, feature_map="softmax", **choices
    )
    return o


def layer_merge(x: LayerInputs) -> Tensor:
    return layer(x, mix="merge", coverage="outside", merge_bias=x.merge_bias)


def layer_sum(x: LayerInputs) -> Tensor:
    return layer(x, mix="sum", coverage="all", sinks=x.sinks)


def grouped(x: Tensor) -> Tensor:
    """Repeat key heads to the query heads, as peers without grouped heads need."""
    from shapes import HEADS

    return x.repeat_interleave(HEADS // x.shape[2], dim=2)


def fla_gla_scalar(x: LayerInputs) -> Tensor:
    """Numerator and denominator by a column of ones, gate repeated to every channel."""
    from fla.ops.gla import chunk_gla

    ones = F.pad(grouped(x.v), (0, 1), value=1.0)
    o, _ = chunk_gla(x.phi_q, grouped(x.phi_k), ones, grouped(x.g)[..., None].expand_as(x.phi_q), scale=1.0)
    return o[..., :-1] / o[..., -1:]


def fla_gla_channel(x: LayerInputs) -> Tensor:
    from fla.ops.gla import chunk_gla

    return chunk_gla(x.phi_q, grouped(x.phi_k), grouped(x.v), grouped(x.g_channel), scale=1.0)[0]


def simple_gla(*tensors: Tensor, **options: float) -> Tensor:
    """fla's op, whose backward refuses this Triton on Hopper for its wrong gradients; here only its time counts."""
    import fla.ops.common.chunk_o
    from fla.ops.simple_gla import chunk_simple_gla

    fla.ops.common.chunk_o.IS_NVIDIA_HOPPER = False
    return chunk_simple_gla(*tensors, **options)[0]


def fla_simple_gla(x: LayerInputs) -> Tensor:
    return simple_gla(x.phi_q, grouped(x.phi_k), grouped(x.v), grouped(x.g), scale=1.0)


def fla_window(x: LayerInputs) -> Tensor:
    from fla.ops.attn import parallel_attn

    return parallel_attn(x.q, x.k, x.v, window_size=WINDOW, sink_bias=x.sinks.logsumexp(-1))


def fla_layer(x: LayerInputs) -> Tensor:
    """A Lizard layer put together from what fla offers: maps in PyTorch, numerator and denominator, window."""
    phi_q = two_sided_softmax(pre_activations(x.q, x.q_map))
    phi_k = grouped(two_sided_softmax(pre_activations(x.k, x.k_map)))
    gate = grouped(x.g)
    numerator = simple_gla(phi_q, phi_k, grouped(x.v), gate, scale=1.0)
    ones = grouped(x.v).new_ones(*phi_k.shape[:3], 16)
    denominator = simple_gla(phi_q, phi_k, ones, gate, scale=1.0)
    return numerator / denominator[..., :1] + fla_window(x)


def full_attention(x: LayerInputs) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


ROWS = (
    Row("gated, scalar gate", "lizard chunk_gated_attn", gated_scalar, 0.8, 3.5),
    Row("gated, scalar gate", "fla chunk_gla, gate expanded, ones column", fla_gla_scalar),
    Row("gated, scalar gate", "fla chunk_simple_gla, no normaliser", fla_simple_gla),
    Row("gated, per-channel gate", "lizard chunk_gated_attn", gated_channel, 1.6, 6.5),
    Row("gated, per-channel gate", "fla chunk_gla, no normaliser", fla_gla_channel),
    Row("window", "lizard window_attn", window, 0.5, 2.2),
    Row("window", "fla parallel_attn, sink, no anchors", fla_window),
    Row("whole layer", "lizard merge, outside", layer_merge, 1.2, 4.8),
    Row("whole layer", "lizard sum, all, sinks", layer_sum, 1.2, 4.8),
    Row("whole layer", "full causal attention (SDPA)", full_attention),
    Row("whole layer", "put together from fla", fla_layer),
)
