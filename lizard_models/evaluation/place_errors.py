"""What each key head of each layer loses of its teacher's attention with so many places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_models.distill.key_labels import TeacherAttention, teacher_weights
from lizard_models.distill.stage0 import Labels, LayerKeys, read_teacher, scored_layers
from lizard_models.model.attention import LizardAttention
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_ops import key_expiry, without_autocast

LEVELS = (0, 8, 16, 32, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
BLOCK = 256  # queries whose attention matrices exist at a time


@torch.no_grad()
def place_errors(
    model: LizardCausalLM,
    rows: Tensor,
    levels: Sequence[int] = LEVELS,
    block: int = BLOCK,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:
    """[L, Hk, len(levels)] float64: relative squared error after the output projection of the layers that keep keys.

    With a the teacher's softmax, and a' the same over window, anchors and the keys that the layer's scores keep in so
    many places of key head h, over all tokens i of ``rows``::

        sum_i | sum of the query heads of h of W_o (sum_j a'_ij v_j - sum_j a_ij v_j) |^2  /  sum_i | o_i |^2

    with o the layer's whole output after the projection: the other heads are exact, and there is no linear branch.
    Before stage 2, when the weights are the teacher's; the layers read the teacher's own stream. rows [N, T] without
    padding, longer than window and anchors. advance: called with the rows done and all of them.

    Raises ValueError for rows that are too short, and a model without scores of keys.
    """
    scores = model.key_scores()
    if not len(scores):
        raise ValueError("model: has no layer that keeps keys, wanted scores by which keys are kept")
    layers, mode = scored_layers(model, scores), model.mode
    sums: list[Any] = [0.0] * len(layers)

    def look(number: int, attention: LizardAttention, keys: LayerKeys) -> None:
        sums[number] = sums[number] + layer_errors(attention, scores[number], keys, levels, block)

    model.set_attention_mode("teacher")
    try:
        for done, row in enumerate(rows.split(1)):
            advance(done, len(rows))
            read_teacher(model, row, Labels("output", block, 1), look, layers)
    finally:
        model.set_attention_mode(mode)
    advance(len(rows), len(rows))
    return torch.stack([(found[:-1] / found[-1:]).unflatten(0, (-1, len(levels))).cpu() for found in sums])


def layer_errors(
    attention: LizardAttention, score: Any, keys: LayerKeys, levels: Sequence[int], block: int = BLOCK
) -> Tensor:
    """[Hk len(levels) + 1] float64: squared errors of each head with each number of places, and squared outputs."""
    config, given = attention.lizard.config, keys.attention
    with without_autocast(given.q):
        late = score(keys.x, keys.k, keys.v, seen=keys.seen(score))[0]
        known = torch.cat([late[:, score.delay :], late.new_zeros(late[:, : score.delay].shape)], 1)
        length = known.shape[1]
        capped = [min(places, length) for places in levels]  # more than there are keys keep them all
        apart = sorted(set(capped))
        ends = [key_expiry(known, config.window, config.anchors, places).expiry for places in apart]  # [B, T, Hk]
        blocks = (slice(start, min(start + block, length)) for start in range(0, length, block))
        found = torch.stack([block_errors(given, ends, at) for at in blocks]).sum(0)
        errors = found[:-1].unflatten(0, (-1, len(apart)))[:, [apart.index(places) for places in capped]]
        return torch.cat([errors.flatten(), found[-1:]])


def block_errors(attention: TeacherAttention, ends: Sequence[Tensor], at: slice) -> Tensor:
    """``layer_errors`` of the queries ``at`` alone. ends [B, T, Hk]: expiries, for each number of places."""
    q, k, v = attention.q[:, at].float(), attention.k[:, : at.stop].float(), attention.v[:, : at.stop].float()
    weight, key_heads = attention.output_weight.float(), k.shape[2]
    by_head = weight.unflatten(1, (key_heads, -1))  # [hidden, Hk, G Dv]
    a = teacher_weights(attention, q, k, at.start)  # [B, Hk, G, i, j]
    values = v.permute(0, 2, 1, 3).unsqueeze(2)  # [B, Hk, 1, j, Dv]
    exact = a @ values
    o = exact.permute(0, 3, 1, 2, 4).flatten(2)  # [B, i, Hq Dv]
    bias = None if attention.output_bias is None else attention.output_bias.float()
    queries = torch.arange(at.start, at.stop, device=q.device)[:, None]
    errors = []
    for end in ends:
        seen = queries < end[:, : at.stop].transpose(1, 2)[:, :, None]  # [B, Hk, i, j], what is later has no weight
        kept = a.masked_fill(~seen.unsqueeze(2), 0.0)
        lost = (kept @ values) / kept.sum(-1, keepdim=True) - exact
        out = torch.einsum("bhgid,ohgd->bhio", lost, by_head.unflatten(2, (a.shape[2], -1)))
        errors.append(out.double().square().sum((0, 2, 3)))
    whole = F.linear(o, weight, bias).double().square().sum()
    return torch.cat([torch.stack(errors, 1).flatten(), whole.reshape(1)])
