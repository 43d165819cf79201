"""Until when each key stays exact: the public function."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lizard_ops.common.dispatch import choose_impl
from lizard_ops.key_expiry.arguments import Expiries, ExpiryInputs, ExpiryOptions, ExpiryState, expiry_arguments
from lizard_ops.key_expiry.naive import naive_expiry


def key_expiry(
    scores: Tensor,
    window: int,
    anchors: int,
    kept_keys: int | Sequence[int],
    *,
    cu_seqlens: Tensor | None = None,
    padding_mask: Tensor | None = None,
    initial_state: ExpiryState | None = None,
    output_final_state: bool = False,
    impl: str = "auto",
) -> Expiries:
    """The first query that no longer sees each key exactly, if the best ``kept_keys`` keys outlive their window.

    Key j leaves the window at query j + window. Of the keys that have left it and are no anchors, the best so far stay
    exact, ``kept_keys`` of them: larger score first, then the earlier position. For position j of a sequence (positions
    count its real tokens only)::

        better(j) = {j' >= anchors: s_j' > s_j, or s_j' = s_j and j' < j}        of one key head
        e_j       = max(j, p) + window,  p the kept_keys-th of better(j) in the order of positions
        e_j       = NEVER                for anchors, and where better(j) has fewer so far

    So e_j >= j + window, at most one key of a head expires at each query, at most kept_keys are alive beyond window and
    anchors, and kept_keys=0 gives e_j = j + window. An expiry depends on scores alone and has no gradient.

    A call decides by the scores that it has seen, its state's included. What is decided never changes, and may lie
    beyond the last token of the call; what is not is ``lizard_ops.NEVER`` (2**62) until a later call that carries the
    state decides it: ``carried`` has the expiries of all keys that ``initial_state`` holds. A state holds each key that
    is yet to expire, so ``expiry`` and ``carried`` name, between them, the key that expires at each query of the call.
    Segments of any size, single tokens and the whole agree exactly.

    Args:
        scores: [B, T, Hk], any floating dtype, compared as float32; infinities are scores like others (-0 equals 0).
        window: keys a query sees, its own included, >= 1.
        anchors: keys at the start of the sequence that never expire and take no place.
        kept_keys: places per key head, >= 0: a number, or one for each.
        cu_seqlens: [N + 1] int32 or int64, the ends of N sequences packed into one row (B = 1), from 0 to T.
        padding_mask: [B, T] bool, True at real tokens, anywhere in a row; padding is no key, and its expiry is NEVER.
        initial_state: what an earlier call left (``output_final_state``) with the same options.
        output_final_state: return the state after the last token.
        impl: "auto" (Triton on CUDA tensors, PyTorch elsewhere), "triton", "torch" or "naive".

    Returns:
        ``Expiries``: expiry [B, T, Hk] int64, position of the query in its sequence; state, an ``ExpiryState`` or None;
        carried [N, kept_keys + window, Hk] int64 or None without an initial_state: of its places, then of its ring's
        slots, NEVER where they hold no key.

    Raises:
        ValueError: an argument of the wrong type, rank, shape, dtype or device; NaN among the scores and bad entries of
            cu_seqlens (values on a GPU: inside ``lizard_ops.checked()``; unchecked, NaN has some place in the order);
            a state of other options; an impl that cannot do what was asked.
    """
    options = ExpiryOptions(window, anchors, kept_keys, output_final_state)
    inputs, options = expiry_arguments(ExpiryInputs(scores, initial_state, cu_seqlens, padding_mask), options)
    chosen = choose_impl(impl, scores, None)
    if chosen == "naive":
        form = naive_expiry
    elif chosen == "triton":
        from lizard_ops.key_expiry.triton.chunk import expiry_triton as form
    else:
        from lizard_ops.key_expiry.chunk_torch import expiry_torch as form
    expiry, left = form(inputs, options)
    return Expiries(expiry, None if left is None else left.state, None if left is None else left.carried)
