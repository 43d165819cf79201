"""Hybrid attention of projected heads, feature maps' matrices and RoPE included: the public function."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.direct import PLAIN, is_watched
from lizard_ops.common.dispatch import choose_impl
from lizard_ops.common.features import feature_dim
from lizard_ops.common.state import AttentionState
from lizard_ops.feature_projection.api import project_both
from lizard_ops.hybrid_attn.api import chunk_hybrid_attn
from lizard_ops.hybrid_attn.arguments import HybridOptions
from lizard_ops.rotary.api import rotary_both

if TYPE_CHECKING:
    from lizard_ops.hybrid_attn.triton.call import Known

MOST = 256  # kinds of calls that are remembered
RARE = ("sinks", "alpha", "initial_state", "cu_seqlens", "padding_mask", "scores", "expiry")
_known: dict[tuple[Any, ...], Known] = {}


class Heads(NamedTuple):
    """The tensors of a call."""

    q: Tensor  # [B, T, Hq, D]
    k: Tensor  # [B, T, Hk, D]
    v: Tensor  # [B, T, Hk, V]
    query_map: Tensor  # [Mq, D, Fp]
    key_map: Tensor  # [Mk, D, Fp]
    cos: Tensor  # [B or 1, T or 1, D]
    sin: Tensor
    g: Tensor | None  # [B, T, Hg]
    merge_bias: Tensor | None  # [B, T, Hq]


def hybrid_heads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_map: Tensor,
    key_map: Tensor,
    cos: Tensor,
    sin: Tensor,
    g: Tensor | None,
    window: int,
    *,
    merge_bias: Tensor | None = None,
    **choices: Any,
) -> tuple[Tensor, AttentionState | None]:
    """``chunk_hybrid_attn`` of heads as a layer projects them, with what stands between::

        q, k, fq, fk = project_both(q, k, query_map, key_map)
        q, k         = rotary_both(q, k, cos, sin)
        o, state     = chunk_hybrid_attn(q, k, v, fq, fk, g, window, merge_bias=merge_bias, **choices)

    These ops and their bits; the kernels are launched with one look at the arguments and have one node of autograd,
    where Triton runs them on plain tensors without a carried state, packing, padding, sinks or scores, with a gate for
    each head and a merge bias for each token or none. The first call of a kind goes through the three ops, which check
    it: without gradients, if they are needed, and then as all others, so that each call of a kind saves the same.

    Args:
        q: [B, T, Hq, D], k: [B, T, Hk, D], v: [B, T, Hk, V], before RoPE. Their gradients are written
            over those behind RoPE (``project_heads`` with reuse_gradient).
        query_map: [Mq, D, Fp] and key_map: [Mk, D, Fp], as ``project_both`` takes them.
        cos, sin: [B or 1, T or 1, D].
        g, window, merge_bias, choices: as for ``chunk_hybrid_attn``, ``impl`` for all three.

    Returns:
        (o [B, T, Hq, V], state), as ``chunk_hybrid_attn``.

    Raises:
        ValueError: as the three.
    """
    heads = Heads(q, k, v, query_map, key_map, cos, sin, g, merge_bias)
    kind, known = _find(heads, window, choices)
    if known is not None and not _needs_more(heads, choices):
        from lizard_ops.hybrid_attn.triton.heads import hybrid_heads_triton

        if g is not None:
            checks.check_gate_values(g, None)
        return hybrid_heads_triton(heads, known)
    if kind is None or known is not None or not _may_be_known(heads, choices) or _needs_more(heads, choices):
        return _one_by_one(heads, window, choices)
    with torch.no_grad():
        found = _one_by_one(heads, window, choices)
    known = _remember(kind, heads, window, choices)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in heads):
        return found
    from lizard_ops.hybrid_attn.triton.heads import hybrid_heads_triton

    return hybrid_heads_triton(heads, known)  # saves what it saves in a layer that is run again in the backward


def _one_by_one(heads: Heads, window: int, choices: dict[str, Any]) -> tuple[Tensor, AttentionState | None]:
    """The three ops."""
    q, k, v, query_map, key_map, cos, sin, g, merge_bias = heads
    impl = choices.get("impl", "auto")
    q, k, fq, fk = project_both(q, k, query_map, key_map, reuse_gradient=True, impl=impl)
    q, k = rotary_both(q, k, cos, sin, impl=impl)
    return chunk_hybrid_attn(q, k, v, fq, fk, g, window, merge_bias=merge_bias, **choices)


def _remember(kind: tuple[Any, ...], heads: Heads, window: int, choices: dict[str, Any]) -> Known:
    """What is known from now on of calls of this kind, which the three ops have accepted."""
    from lizard_ops.hybrid_attn.triton.call import Known

    if len(_known) >= MOST:
        _known.clear()
    known = _known[kind] = Known(_options(heads, window, choices))
    return known


def _find(heads: Heads, window: int, choices: dict[str, Any]) -> tuple[tuple[Any, ...] | None, Known | None]:
    """All that the checks of shapes and the launches read, None where somebody looks or it cannot be remembered; and
    what is known of it."""
    if is_watched():  # torch.compile must not look at what is known: it would compile again where that has grown
        return None, None
    facts: list[Any] = []
    for x in heads:
        if x is None:
            facts.append(None)
        elif type(x) in PLAIN:
            facts += (x.shape, x.stride(), x.dtype, x.device)
        else:
            return None, None
    kind = (*facts, window, type(window), *choices.items(), *map(type, choices.values()))
    try:
        return kind, _known.get(kind)
    except TypeError:  # a list among the choices
        return None, None


def _needs_more(heads: Heads, choices: dict[str, Any]) -> bool:
    """Whether a call needs the three ops for what is no part of its kind: gradients that one node has not, autocast."""
    q, cos, sin = heads.q, heads.cos, heads.sin
    if torch.is_grad_enabled() and (choices.get("output_final_state") or cos.requires_grad or sin.requires_grad):
        return True
    return q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)


def _may_be_known(heads: Heads, choices: dict[str, Any]) -> bool:
    """Whether the launches of ``hybrid_heads_triton`` are those of this kind of call."""
    q, k, _, query_map, key_map, _, _, g, bias = heads
    if any(choices.get(name) is not None for name in RARE):
        return False
    if choices.get("gate_form", "stable") != "stable" or choices.get("feature_map") == "exp":
        return False
    if any(x is not None and (x.ndim != 3 or x.dtype != torch.float32) for x in (g, bias)):
        return False
    if q.dtype != k.dtype or query_map.shape[1:] != key_map.shape[1:] or not q.numel() or not k.numel():
        return False
    return choose_impl(choices.get("impl", "auto"), q, None) == "triton" and q.dtype != torch.float64


def _options(heads: Heads, window: int, choices: dict[str, Any]) -> HybridOptions:
    """The choices of a call that ``chunk_hybrid_attn`` has accepted, as it normalises them."""
    named = {name: value for name, value in choices.items() if name in HybridOptions._fields}
    options = HybridOptions(window=window, **named)
    features = feature_dim(heads.key_map.shape[2], options.feature_map)
    default = 1.0 if options.normalize else features**-0.5
    return options._replace(
        scale=heads.q.shape[3] ** -0.5 if options.scale is None else float(options.scale),
        feature_scale=default if options.feature_scale is None else float(options.feature_scale),
    )
