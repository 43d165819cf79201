"""The scores of keys that become known with one token: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.autocast import without_autocast
from lizard_ops.common.dispatch import choose_impl, float64_of
from lizard_ops.key_score.arguments import (
    KeyScoreState,
    KeyScoreWeights,
    ReceivedInputs,
    StepInputs,
    step_arguments,
)
from lizard_ops.key_score.step_torch import key_score_step_torch


def key_score_step(
    sums: Tensor,
    k: Tensor,
    v: Tensor,
    weights: KeyScoreWeights,
    state: KeyScoreState,
    *,
    received: ReceivedInputs | None = None,
    padding_mask: Tensor | None = None,
    inplace: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, KeyScoreState]:
    """One token of each sequence into the scores of its keys, and the score of one earlier key out of them.

    With p the position of the token, x_j a layer's input, zero before the start of a sequence, and key and value k_jh,
    v_jh of head h before RoPE, norms |.| of at least 1e-6::

        base_jh = u_h . gelu(sum_{o = -1..2} W_o x_{j+o} + b) + a_h . (log |k_jh|, log |v_jh|, cos(k_jh, m_jh)) + c_h
        m_jh    = mean over i <= j of k_ih / |k_ih|

    Without ``received`` the score returned is that of the key two tokens before, base_{p-2}; 0 where p < 2. With it
    the key W - 1 tokens before has received all the attention that it ever will, and its score is::

        score_jh = base_jh + c'_h . gelu(A_h (f_jh - m_h) / d_h + b'_h)        j = p - W + 1; 0 where j < 0
        f_jh     = the three statistics in base_jh, log sum b_ij, log sum_{i >= j + 3W/4} b_ij, log max b_ij
        b_ij     = exp(s_ij) / sum over i - W < l <= i and l < A of exp(s_il),  s_il = softcap(scale q_i . k_l)

    over the queries i of the head's group with j + 2 <= i < j + W and i % stride = stride - 1; sums and the maximum are
    at least 1e-7. No gradient goes through b.

    Args:
        sums: [N, 1, 4 S] float32 or float64, W_o x_p of o = -1, 0, 1, 2 one after the other: one matrix product.
        k: [N, 1, Hk, D] any floating dtype, before RoPE.
        v: [N, 1, Hk, V] any floating dtype.
        weights: ``KeyScoreWeights`` of the dtype of the sums.
        state: ``KeyScoreState`` of the tokens before, zeros at the start of a sequence.
        received: ``ReceivedInputs``, keys and query as the window sees them, before its ring takes the new key.
        padding_mask: [N, 1] bool, False where a sequence has no token; k, v and sums must be finite there, the score
            is 0 and its state stays.
        inplace: overwrite the tensors of ``state``, position included, which must be contiguous, and return it: its
            addresses stay, and a CUDA graph of the step can be replayed.
        impl: "triton" is one launch, two with ``received``, of float32 sums without a mask, and has no backward; "auto"
            takes it for CUDA tensors wherever that holds and no gradient is recorded; "torch", which is "naive" too.

    Returns:
        (scores [N, 1, Hk] in the dtype of the sums, the state after the token).

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, a window under 3, inplace where gradients are
            recorded, or an impl that cannot do what was asked.
    """
    inputs = step_arguments(StepInputs(sums, k, v, weights, state, received, padding_mask, inplace))
    gradients = torch.is_grad_enabled() and any(t.requires_grad for t in inputs.tensors())
    checks.want(not (inplace and gradients), "inplace", True, "False where gradients are recorded: use torch.no_grad()")
    beyond = {
        "float64 tensors": any(float64_of(t) for t in (sums, k, v)) or (received is not None and _exact(received)),
        "a padding_mask": padding_mask is not None,
        "gradients": gradients,
    }
    chosen = choose_impl(impl, sums, next((what for what, holds in beyond.items() if holds), None))
    if chosen == "triton":
        from lizard_ops.key_score.triton.op import key_score_step_triton as form
    else:
        form = key_score_step_torch
    with without_autocast(sums):
        return form(inputs)


def _exact(received: ReceivedInputs) -> bool:
    return torch.float64 in (received.q.dtype, received.k.dtype, received.ring_k.dtype)
