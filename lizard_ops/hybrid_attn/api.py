"""Gated linear attention and window attention in one: the public functions."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.autocast import autocast_inputs, without_autocast
from lizard_ops.common.dispatch import choose_impl, float64_of
from lizard_ops.common.state import AttentionState
from lizard_ops.hybrid_attn.accepted import accepted_arguments
from lizard_ops.hybrid_attn.arguments import PLACES, HybridInputs, HybridOptions
from lizard_ops.hybrid_attn.naive import naive_hybrid
from lizard_ops.hybrid_attn.places import on_padded_places
from lizard_ops.hybrid_attn.pooled import check_pool_gradients, naive_on_pool, on_pool
from lizard_ops.hybrid_attn.ranks import state_of_earlier_ranks


def chunk_hybrid_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor | None,
    window: int,
    *,
    anchors: int = 0,
    sinks: Tensor | None = None,
    sink_form: str = "exp",
    mix: str = "sum",
    alpha: float | Tensor | None = None,
    merge_bias: Tensor | None = None,
    merge_mass: str = "relative",
    coverage: str = "all",
    feature_map: str = "identity",
    normalize: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    feature_scale: float | None = None,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    gate_form: str = "stable",
    scores: Tensor | None = None,
    score_delay: int = 0,
    expiry: Tensor | None = None,
    kept_keys: int | Sequence[int] | None = None,
    state_indices: Tensor | None = None,
    has_state: Tensor | None = None,
    impl: str = "auto",
    context_group: Any = None,
) -> tuple[Tensor, AttentionState | None]:
    """A gated linear branch and a window branch over the same values, mixed: a Lizard layer's attention.

    The window branch is ``window_attn`` on q and k; the linear branch is ``chunk_gated_attn`` on the features of fq
    and fk, over every key past the anchors (coverage="all") or those that the window leaves out ("outside")::

        a_ij               feature_scale phi(fq_i).phi(fk_j) exp(G_i - G_j)
        o_lin, log_mass    sum_j a_ij v_j / sum_j a_ij (or not divided) and log sum_j a_ij
        o_win, lse, m      window softmax, log of its mass (sinks included), largest score of its keys
        mix="sum"          o = o_lin + alpha o_win
        mix="merge"        o = share o_lin + (1 - share) o_win,  share = sigmoid(log_mass - M + merge_bias)
                           M = lse - m with merge_mass="relative", lse with "absolute"; share 0 where no key is eligible

        feature_map="softmax"   phi(x) = [softmax(x), softmax(-x)]
        feature_map="exp"       phi(x) = [exp(x), exp(-x)], kept in log space: no input overflows
        feature_map="identity"  phi(x) = x, finished features, non-negative with normalize

    Args:
        q: [B, T, Hq, K] queries of the window branch. bfloat16, float16, float32 or float64.
        k: [B, T, Hk, K] keys of the window branch, Hk a divisor of Hq.
        v: [B, T, Hk, V] values of both branches.
        fq: [B, T, Hq, Fp] pre-activations of the query features (features with "identity"), any floating dtype.
        fk: [B, T, Hk, Fp] the same of the keys, in the dtype of fq. F = 2 Fp features, Fp with "identity".
        g: log-decay <= 0 in natural log, float32 or float64: [B, T], [B, T, 1], [B, T, Hk], [B, T, Hq] or
            [B, T, Hk, F]; None: no decay.
        window: keys the window branch sees, the query's own included, >= 1.
        anchors: keys at the start of the sequence, always in the window branch and never in the linear one.
        sinks: [M] or [Hq, M] logits of meta memory without values, mass of the window branch.
        sink_form: "exp" or "linear", as for ``window_attn``; "linear" is PyTorch alone ("auto" takes it).
        mix: "sum" or "merge"; "merge" needs normalize.
        alpha: weight of the window branch in a sum: a number, [], [Hq] or [B, T, Hq]; None is 1. None with "merge".
        merge_bias: [Hq] or [B, T, Hq]; None is 0. None with "sum".
        merge_mass: "relative" (LoLCATs' way) or "absolute".
        coverage: "all", "outside" or, the same but where keys are kept, "left".
        feature_map: "identity", "softmax" or "exp".
        normalize: divide the linear branch by its mass.
        scale: factor of the window scores, K ** -0.5 by default.
        softcap: bound of the window scores, as for ``window_attn``.
        feature_scale: factor of the linear weights; 1.0 by default with normalize, else F ** -0.5.
        initial_state, output_final_state, cu_seqlens, padding_mask: as for ``chunk_gated_attn``.
        gate_form: "stable" or "absorbed", as for ``chunk_gated_attn``; never "absorbed" with "softmax" features,
            scores or an expiry.
        scores: [B, T, Hk], any floating dtype, compared as float32 and without a gradient; None: no key is kept. Of the
            keys that have left the window and are no anchors the best ``kept_keys`` of a head so far stay exact, larger
            score first, then the earlier position; what they displace expires. A key is in the window branch of the
            queries before it expires and, with coverage="outside", in the linear branch of those from then on, decayed
            as ever; with "left" it is there from the window's end on, kept or not, and so has no need of a kept key's
            features (half a place of the state, where features are as many as dims); with "all" the linear branch
            covers every key. The largest score m stays that of window and
            anchors: were a kept key's among them, the linear share would rise where such a key is found. ``key_expiry``
            gives the same expiries. States hold kept keys (``AttentionState``), so that chunks of any size, single
            tokens and one pass agree, ties included.
        score_delay: place t of ``scores`` is the score of the key at position t - score_delay of its sequence, one that
            is known a few tokens late; 0 <= score_delay < window. The first score_delay places of a sequence score
            nothing.
        expiry: [B, T, Hk] int64, in place of scores the first query that no longer sees each key exactly, as
            ``key_expiry`` gives it; None without scores is the key's position + window. Anchors never expire, whatever
            theirs says. Without initial_state and output_final_state. The kernels have no gate per channel with either.
        kept_keys: with scores, how many keys of a head they keep, >= 1; with expiry, the most that it keeps alive
            beyond window and anchors at any query, >= 0; None or 0 without either. A number for every key head, or one
            for each: with scores some may be 0, and a state holds as many keys as they are together.
        state_indices: [N] int32 or int64, the pages of the N sequences (rows, or packed) in a pool. ``initial_state``
            is then the pool, its fields [P, ...]: contiguous, or views of one storage of pages (``PageLayout``). Each
            sequence is read on from its page, which is overwritten and no other; the pool is returned. -1: nobody's
            tokens, as graphs are padded with; their outputs are 0 and they leave no trace. Without gradients.
        has_state: [N] bool with state_indices, False for a sequence that begins, whose page may hold anything; None:
            all go on.
        impl: "auto" (Triton on CUDA tensors other than float64, PyTorch elsewhere), "triton", "torch" or "naive".
        context_group: as for ``chunk_gated_attn``; kept keys too are those of the whole sequence. Without expiry.

    Under autocast q, k, v, fq and fk take its dtype; sums, gates, weights and states stay float32.

    Returns:
        (o, state): o [B, T, Hq, V] in the dtype of q, state an ``AttentionState`` or None.

    Raises:
        ValueError: as ``chunk_gated_attn`` and ``window_attn``, pairs of options that exclude each other, NaN among the
            scores, kept keys of a state that are still in its window, and expiries before position + window, two of a
            head at one query or more alive than kept_keys (values on a GPU: inside ``lizard_ops.checked()``).

    Source: Lizard (arXiv 2507.09025) section 3 for the sum; LoLCATs (arXiv 2410.10254) for the merge.
    """
    q, k, v, fq, fk = autocast_inputs(q, k, v, fq, fk)
    inputs, options = accepted_arguments(
        HybridInputs(
            q=q, k=k, v=v, fq=fq, fk=fk, g=g, sinks=sinks, alpha=alpha, merge_bias=merge_bias,
            initial_state=initial_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask, expiry=expiry, scores=scores,
            state_indices=state_indices, has_state=has_state,
        ),
        HybridOptions(
            window=window, anchors=anchors, sink_form=sink_form, mix=mix, merge_mass=merge_mass, coverage=coverage,
            feature_map=feature_map, normalize=normalize, scale=scale, softcap=softcap, feature_scale=feature_scale,
            output_final_state=output_final_state, gate_form=gate_form, kept_keys=kept_keys,
            score_delay=score_delay,
        ),
    )  # fmt: skip
    checks.check_flag("output_final_state", output_final_state)
    checks.want(expiry is None or kept_keys is not None, "kept_keys", kept_keys, PLACES)
    check_pool_gradients(inputs)
    if context_group is not None:
        checks.want(state_indices is None, "state_indices", state_indices, "None with context_group")
        with without_autocast(q):
            inputs = inputs._replace(initial_state=state_of_earlier_ranks(inputs, options, context_group))
    beyond = beyond_kept(inputs, options) or linear_sinks_of(inputs, options) or float64_of(q)
    chosen = choose_impl(impl, q, beyond)
    if chosen == "naive":
        checks.want(gate_form == "stable", "gate_form", gate_form, '"stable" with impl="naive"')
        form = naive_hybrid
    elif chosen == "triton":
        from lizard_ops.hybrid_attn.triton.chunk import chunk_hybrid_triton as form
    else:
        from lizard_ops.hybrid_attn.chunk_torch import chunk_hybrid_torch as form
    over = naive_on_pool if chosen == "naive" else on_pool
    with without_autocast(q):
        return over(partial(on_padded_places, form), inputs, options)


def linear_sinks_of(inputs: HybridInputs, options: HybridOptions) -> str | None:
    """The paper's printed sinks are beyond the Triton kernels."""
    return 'sink_form="linear"' if inputs.sinks is not None and options.sink_form == "linear" else None


def beyond_kept(inputs: HybridInputs, options: HybridOptions) -> str | None:
    """What the Triton kernels of keys that outlive their window leave out."""
    if inputs.scores is None and inputs.expiry is None:
        return None
    return "a gate per channel with kept keys" if inputs.g is not None and inputs.g.ndim == 4 else None


def recurrent_hybrid_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor,
    fk: Tensor,
    g: Tensor | None,
    window: int,
    *,
    anchors: int = 0,
    sinks: Tensor | None = None,
    sink_form: str = "exp",
    mix: str = "sum",
    alpha: float | Tensor | None = None,
    merge_bias: Tensor | None = None,
    merge_mass: str = "relative",
    coverage: str = "all",
    feature_map: str = "identity",
    normalize: bool = True,
    scale: float | None = None,
    softcap: float | None = None,
    feature_scale: float | None = None,
    initial_state: AttentionState | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    scores: Tensor | None = None,
    score_delay: int = 0,
    kept_keys: int | Sequence[int] | None = None,
    inplace: bool = False,
    state_indices: Tensor | None = None,
    impl: str = "auto",
) -> tuple[Tensor, AttentionState | None]:
    """What ``chunk_hybrid_attn`` computes, one position at a time: the decode step, and many of them in a row.

    The arguments, results, state and errors are those of ``chunk_hybrid_attn``. T = 1 is one light step without a
    loop or a synchronisation. With scores each step compares the key that leaves the window with the worst kept one.

    inplace: overwrite the tensors of ``initial_state``, position included, and return that state: no copy of it is
    made, its addresses stay, and a CUDA graph or a compiled step can be replayed on it. Its tensors must be contiguous
    and of the dtypes that an op leaves; gradients (grad mode on, and a tensor that requires one) are refused with a
    ValueError, as they would need the state from before the step.

    state_indices: as for ``chunk_hybrid_attn``, with every sequence in its page already, and with or without
    ``inplace`` the same: the kernel reads and writes the pages where they lie, and its numbers are those of the step on
    the states of the sequences taken out of them, bit for bit. PyTorch takes them out.

    impl: "triton" is the one-launch decode kernel, which takes one token per row (T = 1), a carried state, no padding
    and no packing, with scores no gate per channel, and has no backward; "auto" takes it for CUDA tensors wherever all
    that holds, and PyTorch otherwise.
    """
    q, k, v, fq, fk = autocast_inputs(q, k, v, fq, fk)
    inputs, options = accepted_arguments(
        HybridInputs(
            q=q, k=k, v=v, fq=fq, fk=fk, g=g, sinks=sinks, alpha=alpha, merge_bias=merge_bias,
            initial_state=initial_state, cu_seqlens=cu_seqlens, padding_mask=padding_mask, scores=scores,
            state_indices=state_indices,
        ),
        HybridOptions(
            window=window, anchors=anchors, sink_form=sink_form, mix=mix, merge_mass=merge_mass, coverage=coverage,
            feature_map=feature_map, normalize=normalize, scale=scale, softcap=softcap, feature_scale=feature_scale,
            output_final_state=output_final_state, inplace=inplace, kept_keys=kept_keys, score_delay=score_delay,
        ),
    )  # fmt: skip
    checks.check_flag("output_final_state", output_final_state)
    gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.tensors())
    check_pool_gradients(inputs)
    if inplace and state_indices is None:
        check_inplace(inputs, gradients, impl)
    beyond = {
        "a gate per channel with kept keys": scores is not None and inputs.g is not None and inputs.g.ndim == 4,
        'sink_form="linear"': linear_sinks_of(inputs, options) is not None,
        "float64 tensors": float64_of(q) is not None,
        "anything but one token per row": q.shape[1] != 1 or cu_seqlens is not None or padding_mask is not None,
        "a step without a carried state": initial_state is None,
        "gradients": gradients,
    }
    chosen = choose_impl(impl, q, next((what for what, holds in beyond.items() if holds), None))
    if chosen == "naive":
        with without_autocast(q):
            return naive_on_pool(partial(on_padded_places, naive_hybrid), inputs, options)
    if chosen == "triton":
        from lizard_ops.hybrid_attn.triton.decode import decode_hybrid_triton as form
    else:
        from lizard_ops.hybrid_attn.recurrent import recurrent_hybrid_torch as form
    if chosen == "torch" and state_indices is not None:
        form, options = partial(on_pool, form), options._replace(inplace=True)
    with without_autocast(q):
        return form(inputs, options)


def check_inplace(inputs: HybridInputs, gradients: bool, impl: str) -> None:
    """There is a state to overwrite, and nothing needs what it was before."""
    state = inputs.initial_state
    checks.want(state is not None, "inplace", True, "False without an initial_state to overwrite")
    checks.want(not gradients, "inplace", True, "False where gradients are recorded: use torch.no_grad()")
    checks.want(impl != "naive", "inplace", True, 'False with impl="naive"')
    for name, x in ({} if state is None else state._asdict()).items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"initial_state.{name}: got strides {x.stride()}, wanted contiguous with inplace")
