"""Gated linear attention: the public functions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.autocast import autocast_inputs, without_autocast
from lizard_ops.common.dispatch import choose_impl, float64_of
from lizard_ops.common.state import AttentionState
from lizard_ops.context_parallel.call import checked_group, state_before
from lizard_ops.context_parallel.part import Part, PartOptions
from lizard_ops.gated_attn.arguments import GatedInputs, GatedOptions, gated_arguments
from lizard_ops.gated_attn.naive import naive_gated

Result = tuple[Tensor, AttentionState | None] | tuple[Tensor, AttentionState | None, Tensor]


def chunk_gated_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = True,
    window_offset: int = 0,
    anchors: int = 0,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    return_log_mass: bool = False,
    gate_form: str = "stable",
    chunk_size: int | None = None,
    impl: str = "auto",
    context_group: Any = None,
) -> Result:
    """Gated linear attention over a whole sequence, in chunks: O(T) time and memory.

    For position i of a sequence (positions count its real tokens only), with G the running sum of g::

        a_ij = scale q_i.k_j exp(G_i - G_j)            anchors <= j <= i - window_offset
        o_i  = sum_j a_ij v_j / sum_j a_ij             normalize=True
        o_i  = sum_j a_ij v_j                          normalize=False
        log_mass_i = log sum_j a_ij

    A gate of every channel decays channel c of the product q_i.k_j by its own G_ic - G_jc. Where no key is
    eligible, or their mass is 0, o is 0 and the log-mass -inf. A log-decay of -inf forgets everything before it.
    Normalised outputs stay exact however far the newest eligible key has decayed.

    Args:
        q: [B, T, Hq, K] query features; non-negative with normalize. bfloat16, float16, float32 or float64.
        k: [B, T, Hk, K] key features, Hk a divisor of Hq: query head h reads key head h // (Hq // Hk).
        v: [B, T, Hk, V] values.
        g: log-decay <= 0 in natural log, float32 or float64: [B, T] or [B, T, 1] for all heads, [B, T, Hk] per key
            head, [B, T, Hq] per query head, [B, T, Hk, K] per channel. None: no decay.
        scale: factor of every weight; 1.0 with normalize (it cancels in o), else K ** -0.5.
        normalize: divide by the mass.
        window_offset: how many of the newest keys are left out, the query's own first.
        anchors: how many keys at the start of the sequence are left out.
        initial_state: what an earlier call left (``output_final_state``) with the same options; differentiable.
        output_final_state: return the state after the last token, else None in its place.
        cu_seqlens: [N + 1] int32 or int64, the ends of N sequences packed into one row (B = 1), from 0 to T.
        padding_mask: [B, T] bool, True at real tokens, anywhere in a row. Padding adds no key, value, decay or
            position; its output is 0 and its log-mass -inf.
        return_log_mass: return log_mass too.
        gate_form: "stable", or "absorbed" as in section 4 of the paper: inside a chunk the gate products move into
            the features. Needs one gate per head or for all heads, whose log-decays in a chunk sum to above -80
            (-700 in float64); reads them back to check, which synchronises.
        chunk_size: positions per chunk; None lets the implementation choose.
        impl: "auto" (Triton on CUDA tensors other than float64, PyTorch elsewhere), "triton", "torch" or "naive".
        context_group: a torch.distributed ProcessGroup, or a DeviceMesh of one dimension, whose ranks hold consecutive
            parts of every row, rank 0 the first (docs/parallel.md); parts may differ in padding and in length, each of
            one position at least. o and log_mass are those of this rank's part, the state is that after it: the last
            rank's is that of the whole. All ranks must make this call, and its backward, in the same order, since both
            exchange messages. Without initial_state and cu_seqlens, and without second derivatives.

    Under autocast q, k and v take its dtype; sums, gates and states stay float32.

    Returns:
        (o, state) or (o, state, log_mass): o [B, T, Hq, V] in the dtype of q; log_mass [B, T, Hq] float32 (float64 for
        float64 inputs); state an ``AttentionState`` or None.

    Raises:
        ValueError: an argument of the wrong type, rank, shape, dtype or device; head counts that do not divide;
            gates above 0 or NaN and bad entries of cu_seqlens (values on a GPU: inside ``lizard_ops.checked()``);
            a state that shows other options (``AttentionState`` says which no state shows);
            gates out of bound for "absorbed"; an impl that cannot do what was asked.

    Source: Lizard (arXiv 2507.09025) section 3; the normalised gated form is its parallel form.
    """
    q, k, v = autocast_inputs(q, k, v)
    inputs, options = gated_arguments(
        GatedInputs(
            q=q, k=k, v=v, g=g, initial_state=initial_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask
        ),
        GatedOptions(
            scale=scale, normalize=normalize, window_offset=window_offset, anchors=anchors,
            output_final_state=output_final_state, gate_form=gate_form, chunk_size=chunk_size,
        ),
    )  # fmt: skip
    checks.check_flag("return_log_mass", return_log_mass)
    checks.check_flag("output_final_state", output_final_state)
    if context_group is not None:
        group = checked_group(context_group, inputs)
        choices = PartOptions(offset=window_offset, anchors=anchors)
        with without_autocast(q):
            before = state_before(Part(inputs.v, fk=inputs.k, g=inputs.g), choices, inputs, group)
        inputs = inputs._replace(initial_state=before)
    chosen = choose_impl(impl, q, float64_of(q))
    if chosen == "naive":
        checks.want(gate_form == "stable", "gate_form", gate_form, '"stable" with impl="naive"')
        checks.want(chunk_size is None, "chunk_size", chunk_size, 'None with impl="naive"')
        form = naive_gated
    elif chosen == "triton":
        from lizard_ops.gated_attn.triton.chunk import chunk_gated_triton as form
    else:
        from lizard_ops.gated_attn.chunk_torch import chunk_gated_torch as form
    with without_autocast(q):
        o, state, log_mass = form(inputs, options)
    return (o, state, log_mass) if return_log_mass else (o, state)


def recurrent_gated_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = True,
    window_offset: int = 0,
    anchors: int = 0,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    return_log_mass: bool = False,
    impl: str = "auto",
) -> Result:
    """What ``chunk_gated_attn`` computes, one position at a time: the decode step, and many of them in a row.

    The arguments, results, state and errors are those of ``chunk_gated_attn``. T = 1 is one light step without a
    loop or a synchronisation. impl: "auto" and "torch" are PyTorch on every device, "naive" is the reference;
    "triton" raises ValueError, for no kernel of this op alone exists (``recurrent_hybrid_attn`` has one).
    """
    q, k, v = autocast_inputs(q, k, v)
    inputs, options = gated_arguments(
        GatedInputs(
            q=q, k=k, v=v, g=g, initial_state=initial_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask
        ),
        GatedOptions(
            scale=scale, normalize=normalize, window_offset=window_offset, anchors=anchors,
            output_final_state=output_final_state,
        ),
    )  # fmt: skip
    checks.check_flag("return_log_mass", return_log_mass)
    checks.check_flag("output_final_state", output_final_state)
    checks.check_choice("impl", impl, ("auto", "torch", "naive"))
    if impl == "naive":
        form = naive_gated
    else:
        from lizard_ops.gated_attn.recurrent import recurrent_gated_torch as form
    with without_autocast(q):
        o, state, log_mass = form(inputs, options)
    return (o, state, log_mass) if return_log_mass else (o, state)
