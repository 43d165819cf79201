"""The weights that a hybrid attention layer gives every key, and how far they are from those of softmax attention."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_layers import AttentionConfig, HybridAttention, apply_rope
from lizard_layers.parameters import full_precision
from lizard_ops.common.features import expand_features

Rope = tuple[Tensor, Tensor] | None
NOTHING = -1e9  # log of a weight that is none: finite, so that a row without keys has gradients without NaN
READABLE = {
    "mix": ("merge",),
    "coverage": ("outside",),
    "gate": ("none", "scalar", "key_head", "mamba2", "pooling"),
}


def check_readable(config: AttentionConfig) -> None:
    """Raises ValueError unless ``attention_weights`` can say what a layer of this form gives each key."""
    for name, values in READABLE.items():
        if config.linear_branch and getattr(config, name) not in values:
            wanted = values[0] if len(values) == 1 else f"one of {', '.join(values)}"
            raise ValueError(f"attention weights of a layer need {name} {wanted}, got {getattr(config, name)!r}")


def attention_weights(
    layer: HybridAttention,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    rope: Rope = None,
    at: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """Logs of the weights w_ij with which a layer reads every key, o_i = sum_j w_ij v_j, as one matrix per head.

    With the a_ij, b_ij and sink mass c of ``AttentionChoices`` and the share of the merge::

        w_ij = share_i a_ij / sum_j a_ij                  keys outside window and anchors
               (1 - share_i) b_ij / (sum_j b_ij + c)      keys of the window branch

    and 0, whose log is -inf or less than -1e8, for every other key. x [B, T, d], q [B, T, Hq, D], k [B, T, Hk, D],
    rope and padding_mask as ``HybridAttention`` takes them, from the start of a sequence. at [R]: the query rows
    wanted, default all T. Returns [B, Hq, R, T], float32 (float64 of float64). Differentiable, quadratic in memory:
    for distillation and for looking at, not for inference.

    Raises ValueError for forms without such weights: a sum of both branches, keys in both, a gate per channel.
    """
    config = layer.config
    check_readable(config)
    at = torch.arange(x.shape[1], device=x.device) if at is None else at
    inside, outside = _branches(config, x, at, padding_mask)
    turned = (q, k) if rope is None or not config.window_rope else _turn(q, k, rope)
    scores = _window_scores(config, *turned, at).masked_fill(~inside, -math.inf)
    mass, top = _window_mass(layer, scores)
    if not config.linear_branch:
        return scores - mass.unsqueeze(-1)
    linear = _linear_scores(layer, x, q, k, rope, at, padding_mask).masked_fill(~outside, NOTHING)
    total = linear.logsumexp(-1)
    logit = _share_logit(layer, x, at, total, mass, top)
    far = linear + (F.logsigmoid(logit) - total).unsqueeze(-1)
    near = scores + (F.logsigmoid(-logit) - mass).unsqueeze(-1)
    return torch.where(outside, far, near)


def attention_divergence(
    layer: HybridAttention,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    rope: Rope = None,
    *,
    rows: int = 128,
    sliding_window: int | None = None,
    padding_mask: Tensor | None = None,
) -> Tensor:
    """KL divergence of a layer's attention weights from those of softmax attention over the same heads.

    With p_ij = softmax_j(q_i . k_j / sqrt(D)) over all keys j <= i, RoPE in it, and w of ``attention_weights``::

        KL = mean_i sum_j p_ij (log p_ij - log w_ij)        i: rows with keys outside window and anchors

    An error of outputs hardly tells which of a thousand keys a head sought; this does, and its gradient does not vanish
    where the map is flat (Hedgehog, arXiv 2402.04347, trains maps on such weights alone). The mean is over at most
    ``rows`` evenly spaced rows of each sequence, the last one among them. sliding_window: keys of the softmax
    attention's own window, its query's included. Other arguments as in ``attention_weights``.

    Returns [Hq] in nats, float32 (float64 of float64); zeros where no row has a key outside. Raises ValueError as
    ``attention_weights``.
    """
    config, length = layer.config, x.shape[1]
    check_readable(config)
    first = config.window + config.anchors
    count = min(rows, length - first)
    if count <= 0 or not config.linear_branch:
        return torch.zeros(config.num_heads, dtype=full_precision(x[:0]).dtype, device=x.device)
    at = first + (torch.arange(1, count + 1, device=x.device) * (length - first)) // count - 1
    inside, outside = _branches(config, x, at, padding_mask)
    with torch.no_grad():
        scores = _window_scores(config, *((q, k) if rope is None else _turn(q, k, rope)), at)
        seen = _seen(inside | outside, x, at, sliding_window, padding_mask)
        norm = scores.masked_fill(~seen, -math.inf).logsumexp(-1).clamp(min=NOTHING)
        p = (scores - norm.unsqueeze(-1)).exp().masked_fill(~seen, 0.0)
        near, far = (p.masked_fill(~part, 0.0) for part in (inside, outside))
        mass_near, mass_far = near.sum(-1), far.sum(-1)
        wanted = (far * scores).sum(-1) - mass_far * norm  # sum of p log p outside
    own = scores  # the layer's scores in its window
    if rope is not None and not config.window_rope:
        own = _window_scores(config, q, k, at)
        wanted = wanted + (near * (scores - own)).sum(-1)
    mass, top = _window_mass(layer, own.masked_fill(~inside, -math.inf))
    linear = _linear_scores(layer, x, q, k, rope, at, padding_mask).masked_fill(~outside, NOTHING)
    total = linear.logsumexp(-1)
    logit = _share_logit(layer, x, at, total, mass, top)
    divergence = wanted - (far * linear).sum(-1) + mass_far * (total - F.logsigmoid(logit))
    divergence = divergence + mass_near * (mass - norm - F.logsigmoid(-logit))
    real = outside.any(-1).expand(x.shape[0], 1, count)
    return (divergence * real).sum((0, 2)) / real.sum().clamp(min=1)


def _places(x: Tensor, padding_mask: Tensor | None) -> Tensor:
    """Positions [B or 1, T] that count real tokens only."""
    if padding_mask is None:
        return torch.arange(x.shape[1], device=x.device).unsqueeze(0)
    return padding_mask.long().cumsum(-1) - 1


def _branches(config: AttentionConfig, x: Tensor, at: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which keys are in the window branch and which outside, two of [B or 1, 1, R, T]."""
    place = _places(x, padding_mask)
    i, j = place[:, at].unsqueeze(-1), place.unsqueeze(-2)
    near = (j > i - config.window) | (j < config.anchors)
    seen = torch.arange(x.shape[1], device=x.device) <= at.unsqueeze(-1)
    if padding_mask is not None:
        seen = seen & padding_mask.unsqueeze(-2) & padding_mask[:, at].unsqueeze(-1)
    return (seen & near).unsqueeze(1), (seen & ~near).unsqueeze(1)


def _seen(keys: Tensor, x: Tensor, at: Tensor, sliding_window: int | None, padding_mask: Tensor | None) -> Tensor:
    """Of the keys up to each row's own, those that the softmax attention reaches."""
    if sliding_window is None:
        return keys
    place = _places(x, padding_mask)
    return keys & (place.unsqueeze(-2) > place[:, at].unsqueeze(-1) - sliding_window).unsqueeze(1)


def _window_mass(layer: HybridAttention, scores: Tensor) -> tuple[Tensor, Tensor]:
    """log(sum_j b_ij + c) and the largest score of each row [B, Hq, R]; finite where padding has no key."""
    top, mass = scores.amax(-1).clamp(min=NOTHING), scores.logsumexp(-1).clamp(min=NOTHING)
    if layer.sinks is not None:
        mass = torch.logaddexp(mass, full_precision(layer.sinks()).logsumexp(-1).reshape(-1, 1).to(mass.dtype))
    return mass, top


def _share_logit(layer: HybridAttention, x: Tensor, at: Tensor, total: Tensor, mass: Tensor, top: Tensor) -> Tensor:
    """Log-odds of the linear branch in the merge [B, Hq, R]; as good as -inf where it has no key."""
    logit = total - (mass - top)
    if layer.config.feature_scale is not None:
        logit = logit + math.log(layer.config.feature_scale)
    bias = layer.mix(x)["merge_bias"]
    if bias is None:
        return logit
    return logit + (bias[:, at].transpose(1, 2) if bias.ndim == 3 else bias.unsqueeze(-1))


def _turn(q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return apply_rope(q, *rope), apply_rope(k, *rope)


def _products(q: Tensor, k: Tensor) -> Tensor:
    """q [B, R, Hq, F] . k [B, T, H, F], every key head for its group of queries -> [B, Hq, R, T], of their dtype."""
    q = q.unflatten(2, (k.shape[2], -1))
    return torch.einsum("brhgf,bthf->bhgrt", q, k).flatten(1, 2)


def _window_scores(config: AttentionConfig, q: Tensor, k: Tensor, at: Tensor) -> Tensor:
    scale = config.head_dim**-0.5 if config.scale is None else config.scale
    scores = _products(full_precision(q[:, at]) * scale, full_precision(k))
    return scores if config.softcap is None else config.softcap * torch.tanh(scores / config.softcap)


def _linear_scores(
    layer: HybridAttention, x: Tensor, q: Tensor, k: Tensor, rope: Rope, at: Tensor, padding_mask: Tensor | None
) -> Tensor:
    """log phi(q_i).phi(k_j) + G_i - G_j for every key [B, Hq, R, T], whether the branch holds it or not."""
    config, heads = layer.config, layer.config.num_heads
    linear_k = k.repeat_interleave(config.linear_key_heads // k.shape[2], 2)
    turned = (q, linear_k) if rope is None or not config.linear_rope else _turn(q, linear_k, rope)
    _, _, fq, fk = layer.feature_maps(*turned)
    (phi_q, log_q), (phi_k, log_k) = (expand_features(f, layer.feature_maps.op_feature_map) for f in (fq[:, at], fk))
    # features in the activations' dtype, as the op has them: their products need its relative precision alone
    scores = full_precision(_products(phi_q.to(fq.dtype), phi_k.to(fk.dtype)))
    scores = scores.clamp(min=torch.finfo(torch.float32).tiny).log()
    if log_q is not None and log_k is not None:
        scores = scores + log_q.transpose(1, 2).unsqueeze(-1)
        scores = scores + log_k.transpose(1, 2).unsqueeze(-2).repeat_interleave(heads // log_k.shape[2], 1)
    if layer.gate is None:
        return scores
    g = layer.gate(x, k)
    if padding_mask is not None:
        g = g.masked_fill(~padding_mask.unsqueeze(-1), 0.0)
    decay = g.cumsum(1).transpose(1, 2)  # [B, Hg, T]
    decay = decay.repeat_interleave(heads // decay.shape[1], 1)
    return scores + decay[:, :, at].unsqueeze(-1) - decay.unsqueeze(-2)
