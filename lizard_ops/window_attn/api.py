"""Sliding-window attention with anchors and sinks: the public function."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.autocast import autocast_inputs, without_autocast
from lizard_ops.common.dispatch import choose_impl, float64_of
from lizard_ops.common.state import AttentionState
from lizard_ops.context_parallel.call import checked_group, state_before
from lizard_ops.context_parallel.part import Part, PartOptions
from lizard_ops.window_attn.arguments import WindowInputs, WindowOptions, window_arguments
from lizard_ops.window_attn.naive import naive_window


def window_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    *,
    anchors: int = 0,
    sinks: Tensor | None = None,
    sink_form: str = "exp",
    scale: float | None = None,
    softcap: float | None = None,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    return_lse: bool = False,
    impl: str = "auto",
    context_group: Any = None,
) -> tuple[Tensor, AttentionState | None] | tuple[Tensor, AttentionState | None, Tensor]:
    """Causal softmax attention over the last ``window`` keys and the first ``anchors`` of the sequence.

    For position i of a sequence (positions count its real tokens only)::

        s_ij  = scale q_i.k_j                          i - window < j <= i, and j < anchors; each key once
                softcap tanh(scale q_i.k_j / softcap)  with softcap
        o_i   = sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + c)
        lse_i = log(sum_j exp(s_ij) + c)

    c is the mass of the sinks (meta memory), logits t without values: sum_m exp(t_m), or sum_m t_m as the paper prints
    it, which can bring the denominator to 0 or below and is here to compare with. 0 without sinks.

    Args:
        q: [B, T, Hq, K] queries, with RoPE or not. bfloat16, float16, float32 or float64.
        k: [B, T, Hk, K] keys, Hk a divisor of Hq: query head h reads key head h // (Hq // Hk).
        v: [B, T, Hk, V] values.
        window: keys a query sees, its own included, >= 1.
        anchors: keys at the start of the sequence that every later query sees as well.
        sinks: [M] or [Hq, M] sink logits t, differentiable.
        sink_form: "exp" or "linear" (PyTorch alone: "auto" takes PyTorch for it on every device).
        scale: factor of the scores; K ** -0.5 by default.
        softcap: bound of the scores, as in Gemma 2, or None.
        initial_state: what an earlier call left (``output_final_state``) with the same options; differentiable.
        output_final_state: return the state after the last token, else None in its place.
        cu_seqlens: [N + 1] int32 or int64, the ends of N sequences packed into one row (B = 1), from 0 to T.
        padding_mask: [B, T] bool, True at real tokens, anywhere in a row; padding is no key and takes no window slot,
            its output is 0 and its lse -inf.
        return_lse: return lse too.
        impl: "auto" (Triton on CUDA tensors other than float64, PyTorch elsewhere), "triton", "torch" or "naive".
        context_group: as for ``chunk_gated_attn``.

    Under autocast q, k and v take its dtype; sums and lse stay float32.

    Returns:
        (o, state) or (o, state, lse): o [B, T, Hq, V] in the dtype of q; lse [B, T, Hq] float32 (float64 for float64
        inputs), differentiable; state an ``AttentionState`` or None.

    Raises:
        ValueError: an argument of the wrong type, rank, shape, dtype or device; head counts that do not divide;
            bad entries of cu_seqlens (values on a GPU: inside ``lizard_ops.checked()``);
            a state that shows other options (``AttentionState`` says which no state shows);
            an impl that cannot do what was asked.

    Source: Lizard (arXiv 2507.09025) section 3, anchor window attention; anchors as in StreamingLLM (arXiv 2309.17453).
    """
    q, k, v = autocast_inputs(q, k, v)
    inputs, options = window_arguments(
        WindowInputs(
            q=q, k=k, v=v, sinks=sinks, initial_state=initial_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask
        ),
        WindowOptions(
            window=window, anchors=anchors, sink_form=sink_form, scale=scale, softcap=softcap,
            output_final_state=output_final_state,
        ),
    )  # fmt: skip
    checks.check_flag("return_lse", return_lse)
    checks.check_flag("output_final_state", output_final_state)
    if context_group is not None:
        group = checked_group(context_group, inputs)
        choices = PartOptions(window=window, anchors=anchors)
        with without_autocast(q):
            inputs = inputs._replace(initial_state=state_before(Part(inputs.v, inputs.k), choices, inputs, group))
    beyond = 'sink_form="linear"' if sinks is not None and sink_form == "linear" else float64_of(q)
    chosen = choose_impl(impl, q, beyond)
    if chosen == "naive":
        form = naive_window
    elif chosen == "triton":
        from lizard_ops.window_attn.triton.chunk import window_triton as form
    else:
        from lizard_ops.window_attn.chunk_torch import window_torch as form
    with without_autocast(q):
        o, state, lse, _ = form(inputs, options)
    return (o, state, lse) if return_lse else (o, state)
