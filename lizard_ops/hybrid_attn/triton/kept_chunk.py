"""Hybrid attention of keys with an expiry on the GPU: the kernels between padding and packing."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common import checks
from lizard_ops.common.padding import compact, compaction, restore
from lizard_ops.common.places import most
from lizard_ops.common.rows import changed_rows
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions, expiry_options
from lizard_ops.hybrid_attn.chunk_torch import check_places
from lizard_ops.hybrid_attn.triton.call import chosen
from lizard_ops.hybrid_attn.triton.kept_op import kept_forward
from lizard_ops.key_expiry.arguments import NEVER, ExpiryInputs
from lizard_ops.key_expiry.triton.chunk import expiry_triton


def kept_hybrid(inputs: HybridInputs, weight: Tensor | None, options: HybridOptions) -> Tensor:
    """o of ``chunk_hybrid_attn`` with an expiry or scores; weight [B, T, Hq] float32, alpha of a sum or merge_bias."""
    mask, lengths, scored = inputs.padding_mask, None, inputs.scores is not None
    if scored:
        inputs = inputs._replace(expiry=scored_expiry(inputs, options), scores=None)
    if mask is not None:
        plan = compaction(mask)
        weight, lengths = compact(weight, plan), plan.lengths
        inputs = changed_rows(inputs._replace(alpha=None, merge_bias=None), lambda x: compact(x, plan))
    expiry = inputs.expiry
    assert expiry is not None
    if scored:
        expiry = of_keys(expiry, lengths, options.score_delay)
    else:
        check_kept(expiry, lengths, inputs.cu_seqlens, options)
    g, sinks = inputs.g, inputs.sinks
    o, *_ = kept_forward(
        q=inputs.q,
        k=inputs.k,
        v=inputs.v,
        fq=inputs.fq,
        fk=inputs.fk,
        g=None if g is None else g.float(),
        weight=weight,
        sink=None if sinks is None else sinks.float().logsumexp(-1),
        cu_seqlens=inputs.cu_seqlens,
        lengths=lengths,
        expiry=expiry,
        kept_keys=most(options.kept_keys),
        late=options.late,
        **chosen(options)._asdict(),
    )
    return o if mask is None else restore(o, plan)


def scored_expiry(inputs: HybridInputs, options: HybridOptions) -> Tensor:
    """Expiries [B, T, Hk] of scores, each where its score stands, score_delay tokens after its key."""
    assert inputs.scores is not None
    given = ExpiryInputs(inputs.scores, None, inputs.cu_seqlens, inputs.padding_mask)
    return expiry_triton(given, expiry_options(options)._replace(output_final_state=False))[0]


def of_keys(expiry: Tensor, lengths: Tensor | None, delay: int) -> Tensor:
    """Expiries where their keys stand: the last of a sequence take those of the next one's first, which are NEVER."""
    if lengths is not None:
        row = torch.arange(expiry.shape[1], device=expiry.device)
        expiry = torch.where((row < lengths.unsqueeze(1)).unsqueeze(2), expiry, NEVER)
    if delay == 0:
        return expiry
    return torch.cat([expiry, expiry.new_full((len(expiry), delay, expiry.shape[2]), NEVER)], 1)[:, delay:].contiguous()


def check_kept(
    expiry: Tensor, lengths: Tensor | None, cu_seqlens: Tensor | None, options: HybridOptions
) -> None:  # fmt: skip
    """What the kernels count on: ``check_places`` of each sequence."""
    if not checks.may_read(expiry) or (cu_seqlens is not None and not checks.may_read(cu_seqlens)):
        return
    if cu_seqlens is None:
        check_places(expiry, lengths, options)
        return
    ends = cu_seqlens.tolist()
    for a, b in zip(ends[:-1], ends[1:], strict=True):
        check_places(expiry[:, a:b], None, options)
