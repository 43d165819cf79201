"""Linear attention with a delta rule: the public functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.autocast import autocast_inputs, without_autocast
from lizard_ops.common.state import AttentionState
from lizard_ops.delta_attn.arguments import delta_arguments
from lizard_ops.delta_attn.chunk_torch import chunk_delta_torch
from lizard_ops.delta_attn.naive import naive_delta_attn
from lizard_ops.delta_attn.recurrent import recurrent_delta_torch

Result = tuple[Tensor, AttentionState | None] | tuple[Tensor, AttentionState | None, Tensor]


def chunk_delta_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    window_offset: int = 0,
    anchors: int = 0,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    return_log_mass: bool = False,
    impl: str = "auto",
) -> Result:
    """A memory that replaces what it holds under a key instead of adding to it: the gated delta rule, in chunks.

    For the keys of a sequence in order, anchors <= j (positions count real tokens only), with unit features
    k^ = k / |k|, q^ = q / |q| and G the running sum of g::

        S_j = exp(g_j) (S_{j-1} - beta_j k^_j (k^_j . S_{j-1})) + beta_j k^_j v_j^T
        o_i = q^_i . S_e                                        e = i - window_offset
        log_mass_i = log sum_{anchors <= j <= e} scale q_i.k_j exp(G_i - G_j)

    With beta = 1 a key reads back its own value; with small beta it adds to the memory, as linear attention does. The
    gates between e and i leave o as it is. Where no key is eligible, o is 0 and the log-mass -inf.

    Args:
        q: [B, T, Hq, K] query features, non-negative for the log-mass. bfloat16, float16, float32 or float64.
        k: [B, T, Hk, K] key features, Hk a divisor of Hq: query head h reads the memory of key head h // (Hq // Hk).
        v: [B, T, Hk, V] values.
        g: log-decay <= 0, float32 or float64: [B, T] or [B, T, 1] for all heads, [B, T, Hk] a key head; None: no decay.
        beta: [B, T, Hk] write strengths from 0 to 1, float32 or float64.
        scale: factor of the masses, 1.0 by default.
        window_offset, anchors, initial_state, output_final_state, cu_seqlens, padding_mask, return_log_mass: as for
            ``chunk_gated_attn``. The state holds S as ``s``, the sum of the mass as ``z``, and ``ring_beta``.
        impl: "auto" and "torch" are PyTorch on every device, without a synchronisation; "naive" is the reference.

    Under autocast q, k and v take its dtype; all arithmetic is float32 (float64 for float64 inputs).

    Returns:
        (o, state) or (o, state, log_mass): o [B, T, Hq, V] in the dtype of q, log_mass [B, T, Hq] float32 (or float64).

    Raises:
        ValueError: as ``chunk_gated_attn``; a gate a query head or a channel; a beta outside 0 to 1 (on a GPU: inside
            ``lizard_ops.checked()``); impl="triton", which has no kernel.

    Source: DeltaNet in parallel (arXiv 2406.06484), its gated form (arXiv 2412.06464).
    """
    return _delta(
        chunk_delta_torch, q, k, v, g, beta, scale=scale, window_offset=window_offset, anchors=anchors,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        padding_mask=padding_mask, return_log_mass=return_log_mass, impl=impl,
    )  # fmt: skip


def recurrent_delta_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    *,
    scale: float | None = None,
    window_offset: int = 0,
    anchors: int = 0,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    return_log_mass: bool = False,
    impl: str = "auto",
) -> Result:
    """What ``chunk_delta_attn`` computes, one position at a time; arguments, results, state and errors are its own."""
    return _delta(
        recurrent_delta_torch, q, k, v, g, beta, scale=scale, window_offset=window_offset, anchors=anchors,
        initial_state=initial_state, output_final_state=output_final_state, cu_seqlens=cu_seqlens,
        padding_mask=padding_mask, return_log_mass=return_log_mass, impl=impl,
    )  # fmt: skip


def _delta(
    form: Any, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, *, scale: float | None,
    window_offset: int, anchors: int, initial_state: AttentionState | None, output_final_state: bool,
    cu_seqlens: Tensor | None, padding_mask: Tensor | None, return_log_mass: bool, impl: str,
) -> Result:  # fmt: skip
    q, k, v = autocast_inputs(q, k, v)
    g, beta, scale = delta_arguments(
        q, k, v, g, beta, scale, window_offset, anchors, initial_state, cu_seqlens, padding_mask
    )
    checks.check_flag("return_log_mass", return_log_mass)
    checks.check_flag("output_final_state", output_final_state)
    checks.check_choice("impl", impl, ("auto", "torch", "naive"))
    common: dict[str, Any] = dict(
        scale=scale, window_offset=window_offset, anchors=anchors, initial_state=initial_state,
        output_final_state=output_final_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask,
    )  # fmt: skip
    if impl == "naive":
        return naive_delta_attn(q, k, v, g, beta, **common, return_log_mass=return_log_mass)
    with without_autocast(q):
        o, state, log_mass = form(q, k, v, g, beta, **common)
    o = o.to(q.dtype)
    return (o, state, log_mass) if return_log_mass else (o, state)
