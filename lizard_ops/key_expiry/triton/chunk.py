"""Key expiry on the GPU: the kernels between padding, packing and carried states."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common.padding import compact, compaction, restore
from lizard_ops.common.places import most
from lizard_ops.common.rows import changed_rows
from lizard_ops.key_expiry.arguments import NEVER, ExpiryInputs, ExpiryOptions, Left
from lizard_ops.key_expiry.stream import ranked_stream, told, unkept
from lizard_ops.key_expiry.triton.op import displaced, fresh


def expiry_rows(inputs: ExpiryInputs, lengths: Tensor | None, options: ExpiryOptions) -> tuple[Tensor, Left]:
    """What ``chunk_torch.expiry_rows`` gives of right-padded rows, or packed ones."""
    stream, layout = ranked_stream(inputs, lengths, options)
    if options.kept_keys == 0:
        return told(stream, layout, inputs, options, unkept(stream, options))
    ranks = stream.rows.flatten(0, 1).T
    judged = stream.judged if options.output_final_state else None
    by_kept, by_row, last = displaced(stream.kept.transpose(1, 2), ranks, stream.ends, judged)
    kept = last.transpose(1, 2) if options.output_final_state else None
    found = by_kept.transpose(1, 2), by_row.T.unflatten(0, stream.rows.shape[:2]), kept
    return told(stream, layout, inputs, options, found)


def expiry_triton(inputs: ExpiryInputs, options: ExpiryOptions) -> tuple[Tensor, Left]:
    """(expiry [B, T, Hk], what is left of each sequence) of checked arguments."""
    lengths, plan = None, None
    if inputs.padding_mask is not None:
        plan = compaction(inputs.padding_mask)
        inputs = changed_rows(inputs, lambda x: compact(x, plan), padding_mask=None)
        lengths = plan.lengths
    carried = inputs.initial_state is not None or options.output_final_state
    if carried or inputs.cu_seqlens is not None or options.kept_keys == 0:
        expiry, left = expiry_rows(inputs, lengths, options)
    else:
        places = options.kept_keys
        each = places if isinstance(places, tuple) else None
        expiry = fresh(inputs.scores, lengths, options.window, options.anchors, most(places), each)
        left = Left(torch.full((len(expiry),), expiry.shape[1], device=expiry.device) if lengths is None else lengths)
    return expiry if plan is None else restore(expiry, plan, NEVER), left
