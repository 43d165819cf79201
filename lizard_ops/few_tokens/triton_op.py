"""The launch: programs of the three kernels side by side."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lizard_ops.common.dispatch import on_device
from lizard_ops.common.sizes import cdiv, power_of_2
from lizard_ops.feature_projection.triton.kernels import project_tiles
from lizard_ops.feature_projection.triton.op import TOKENS, blocks, config_for, precision, rows, tiles_each
from lizard_ops.gate.triton_op import columns_of, one_number
from lizard_ops.rotary.triton_op import PAIRS, steps_of, turn_rows, unit_rows
from lizard_ops.tiles.launcher import launch_kernel


@triton.jit(do_not_specialize=["temperature", "maps_q", "maps_k", "turns_q", "turns_k"])
def token_heads_kernel(
    x, q, k, weight_q, weight_k, cos, sin, gate_weight, gate_bias, bias_weight, bias,
    g, m, y_q, y_k, fq, fk, temperature, tokens, length,
    q_b, q_t, q_h, k_b, k_t, k_h, cos_b, cos_t, sin_b, sin_t, maps_q, maps_k, turns_q, turns_k,
    HIDDEN: tl.constexpr, G: tl.constexpr, H: tl.constexpr, BH: tl.constexpr,
    HQ: tl.constexpr, MQ: tl.constexpr, HK: tl.constexpr, MK: tl.constexpr,
    D: tl.constexpr, BD: tl.constexpr, F: tl.constexpr, BF: tl.constexpr, BN: tl.constexpr, STEPS: tl.constexpr,
    PRECISION: tl.constexpr, BHQ: tl.constexpr, BHK: tl.constexpr, HALF: tl.constexpr, BNQ: tl.constexpr,
    BNK: tl.constexpr,
):  # fmt: skip
    """The first maps_q and maps_k programs are those of the feature maps, the next turns_q and turns_k turn heads, the
    rest form a gate or a merge bias each."""
    pid = tl.program_id(0)
    keys, turns = maps_q + maps_k, maps_q + maps_k + turns_q
    if pid < maps_q:
        project_tiles(pid, q, weight_q, fq, tokens, length, q_b, q_t, q_h, HQ, MQ, D, BD, F, BF, BN, STEPS, PRECISION)
    elif pid < keys:
        project_tiles(
            pid - maps_q, k, weight_k, fk, tokens, length, k_b, k_t, k_h, HK, MK, D, BD, F, BF, BN, STEPS, PRECISION
        )
    elif pid < turns:
        turn_rows(
            (pid - keys) * BNQ, q, cos, sin, y_q, tokens, length, q_b, q_t, q_h, cos_b, cos_t, sin_b, sin_t,
            HQ, HALF, BHQ, BD // 2, BNQ, False,
        )  # fmt: skip
    elif pid < turns + turns_k:
        turn_rows(
            (pid - turns) * BNK, k, cos, sin, y_k, tokens, length, k_b, k_t, k_h, cos_b, cos_t, sin_b, sin_t,
            HK, HALF, BHK, BD // 2, BNK, False,
        )  # fmt: skip
    else:
        one_number(
            pid - turns - turns_k, x, gate_weight, gate_bias, bias_weight, bias, g, m, temperature, HIDDEN, G, H, BH
        )


def launch(
    x: Tensor, q: Tensor, k: Tensor, maps: tuple[Tensor, Tensor], rope: tuple[Tensor, Tensor],
    gate: tuple[Tensor, Tensor], merge: tuple[Tensor, Tensor | None], temperature: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The fields of ``TokenHeads``."""
    q, k, x = rows(q), rows(k), x.contiguous()
    (of_q, of_k), (cos, sin) = (weight.contiguous() for weight in maps), unit_rows(*rope)
    (gate_weight, gate_bias), bias_weight = (t.contiguous() for t in gate), merge[0].contiguous()
    bias = None if merge[1] is None else merge[1].contiguous()
    (batch, length, heads, dim), key_heads = q.shape, k.shape[2]
    tokens, tile, biases = batch * length, blocks(*of_q.shape[1:]), bias_weight.shape[0]
    gates, hidden = gate_weight.shape
    g, m = (gate_weight.new_empty(batch, length, count) for count in (gates, biases))
    fq, fk = (t.new_empty(*t.shape[:3], tile["F"]) for t in (q, k))
    y_q, y_k = q.new_empty(q.shape), k.new_empty(k.shape)
    each = tiles_each(tokens)
    of_head = cdiv(tokens, TOKENS * each) * cdiv(tile["F"], tile["BF"])
    wide = [power_of_2(heads), power_of_2(key_heads)]
    turned = [max(1, PAIRS // (w * (tile["BD"] // 2))) for w in wide]
    counts = [of_head * heads, of_head * key_heads, *(cdiv(tokens, n) for n in turned)]
    with on_device(q, dim=dim, features=tile["F"]):
        c = config_for("output", q, of_q)
        launch_kernel(
            token_heads_kernel, sum(counts) + tokens * (gates + biases),
            x, q, k, of_q, of_k, cos, sin, gate_weight, gate_bias, bias_weight, bias,
            g, m, y_q, y_k, fq, fk, temperature, tokens, length,
            *q.stride()[:3], *k.stride()[:3], *steps_of(cos, sin), *counts,
            HIDDEN=hidden, G=gates, H=biases, BH=columns_of(hidden), HQ=heads, MQ=of_q.shape[0], HK=key_heads,
            MK=of_k.shape[0], STEPS=each, PRECISION=precision(q), BHQ=wide[0], BHK=wide[1], HALF=dim // 2,
            BNQ=turned[0], BNK=turned[1], **tile, num_stages=c.stages, **c.launch,
        )  # fmt: skip
    return g, m, y_q, y_k, fq, fk
