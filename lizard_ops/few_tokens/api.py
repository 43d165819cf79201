"""Gate, merge bias, features and turned heads of a few tokens: the function that layers call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.direct import nobody_looks
from lizard_ops.common.dispatch import choose_impl
from lizard_ops.common.kinds import Kinds
from lizard_ops.feature_projection.api import check_both, project_both
from lizard_ops.gate.api import FEW, check_gate_and_bias, gate_and_bias
from lizard_ops.rotary.api import chosen_turn, rotary_both

_accepted = Kinds()


class TokenHeads(NamedTuple):
    """What the attention of a token reads."""

    g: Tensor  # [B, T, G] float32 log-decays
    merge_bias: Tensor  # [B, T, H] float32
    q: Tensor  # [B, T, Hq, D], turned
    k: Tensor  # [B, T, Hk, D], turned
    fq: Tensor  # [B, T, Hq, F] pre-activations
    fk: Tensor  # [B, T, Hk, F]


def token_heads(
    x: Tensor,
    q: Tensor,
    k: Tensor,
    maps: tuple[Tensor, Tensor],
    rope: tuple[Tensor, Tensor],
    gate: tuple[Tensor, Tensor],
    merge: tuple[Tensor, Tensor | None],
    *,
    temperature: float = 1.0,
    impl: str = "auto",
) -> TokenHeads:
    """``gate_and_bias`` of a layer's input, ``project_both`` of its heads and ``rotary_both`` of the same::

        g, merge_bias = gate_and_bias(x, *gate, *merge, temperature=temperature)
        fq, fk        = the pre-activations of project_both(q, k, *maps)
        q, k          = rotary_both(q, k, *rope)

    Args:
        x: [B, T, hidden] the layer's normalised input.
        q, k: [B, T, Hq, D] and [B, T, Hk, D], heads before RoPE.
        maps: weights of queries [Mq, D, F] and of keys [Mk, D, F'].
        rope: (cos, sin), each [B or 1, T or 1, D].
        gate: weight [G, hidden] and bias [G] of the log-decays; merge: weight [H, hidden] and bias [H] or None.
        temperature: a positive finite number.
        impl: "auto", "triton", "torch" or "naive", as those ops have it. Where Triton runs all three on at most 128
            tokens, no gradient is recorded and nobody looks at operators (torch.compile, modes, transforms), they are
            one launch.

    Returns:
        ``TokenHeads``, each with the bits that its own op gives under its default launch.

    Raises:
        ValueError: as those ops, and for x of another batch or length than q.
    """
    tensors = (x, q, k, *maps, *rope, *gate, *merge)
    _accepted.check(tensors, (temperature, impl), lambda: _check(x, q, k, maps, rope, gate, merge, temperature, impl))
    if _in_one(tensors, impl):
        from lizard_ops.few_tokens.triton_op import launch

        return TokenHeads(*launch(x, q, k, maps, rope, gate, merge, float(temperature)))
    g, bias = gate_and_bias(x, *gate, *merge, temperature=temperature, impl=impl)
    q, k, fq, fk = project_both(q, k, *maps, impl=impl)
    return TokenHeads(g, bias, *rotary_both(q, k, *rope, impl=impl), fq, fk)


def _in_one(tensors: tuple[Tensor | None, ...], impl: str) -> bool:
    x, q, k, of_q, of_k, cos, sin, *_ = tensors
    assert x is not None and q is not None and k is not None and of_q is not None and of_k is not None
    assert cos is not None and sin is not None
    few = 0 < x.shape[0] * x.shape[1] <= FEW and q.numel() and k.numel()
    alike = q.dtype == k.dtype and of_q.shape[1:] == of_k.shape[1:]
    floats = torch.float64 not in (x.dtype, q.dtype, cos.dtype, sin.dtype)
    if not few or not alike or not floats or not nobody_looks(*tensors) or torch.is_autocast_enabled(x.device.type):
        return False
    return choose_impl(impl, q, None) == "triton"


def _check(
    x: Tensor, q: Tensor, k: Tensor, maps: tuple[Tensor, Tensor], rope: tuple[Tensor, Tensor],
    gate: tuple[Tensor, Tensor], merge: tuple[Tensor, Tensor | None], temperature: float, impl: str,
) -> None:  # fmt: skip
    """Raises as ``token_heads``; ops that are called one by one check an impl that cannot do what is asked."""
    checks.check_choice("impl", impl, ("auto", "triton", "torch", "naive"))
    check_token_heads(x, q, k, maps, rope, gate, merge, temperature)


def check_token_heads(
    x: Tensor, q: Tensor, k: Tensor, maps: tuple[Tensor, Tensor], rope: tuple[Tensor, Tensor],
    gate: tuple[Tensor, Tensor], merge: tuple[Tensor, Tensor | None], temperature: float,
) -> None:  # fmt: skip
    """Raises as ``token_heads`` but for its impl."""
    check_gate_and_bias(x, *gate, *merge, temperature)
    check_both(q, k, *maps)
    for name, heads in (("q", q), ("k", k)):
        chosen_turn(heads, *rope, "torch", name)
    checks.check_tensor("x", x, (*q.shape[:2], x.shape[2]), q, checks.FLOATS)
