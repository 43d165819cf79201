"""Key expiry in plain PyTorch: a tile of keys after the other against the best so far."""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_ops.common.rows import over_rows
from lizard_ops.key_expiry.arguments import NEVER, ExpiryInputs, ExpiryOptions, Left
from lizard_ops.key_expiry.stream import LOWEST, Found, RankedStream, number_of, ranked_stream, told, unkept

TILE = 256  # keys; a tile compares with as many kept ones and with itself


def expiry_torch(inputs: ExpiryInputs, options: ExpiryOptions) -> tuple[Tensor, Left]:
    """(expiry [B, T, Hk], what is left of each sequence) of checked arguments."""

    def op(inputs, lengths):
        expiry, left = expiry_rows(inputs, lengths, options)
        return [expiry], left

    (expiry,), left = over_rows(op, inputs, (NEVER,))
    return expiry, left


def expiry_rows(inputs: ExpiryInputs, lengths: Tensor | None, options: ExpiryOptions) -> tuple[Tensor, Left]:
    """The same of right-padded rows, ``lengths`` [B] of each (None: all)."""
    stream, layout = ranked_stream(inputs, lengths, options)
    found = unkept(stream, options) if options.kept_keys == 0 else tiled(stream, options)
    return told(stream, layout, inputs, options, found)


def tiled(stream: RankedStream, options: ExpiryOptions) -> Found:
    """What the tiles find of right-padded rows."""
    by_kept, by_row = displaced(stream.kept, stream.rows, TILE)
    if not options.output_final_state:
        return by_kept, by_row, None
    row = torch.arange(stream.rows.shape[1], device=stream.rows.device)
    gone = (row < stream.judged.unsqueeze(1)).unsqueeze(-1)
    every = torch.cat([stream.kept, torch.where(gone, stream.rows, LOWEST)], 1)
    return by_kept, by_row, every.topk(stream.kept.shape[1], 1)[0]


@torch.library.custom_op("lizard_ops::key_expiry_tiles", mutates_args=())
def displaced(kept: Tensor, rows: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """The row at which each key is displaced, -1 where none does it: of the kept keys, by number, and of the rows.

    kept [N, P, Hk] ranks, descending; rows [N, M, Hk] ranks. A key is displaced at the first row, its own or later, by
    which P keys better than it have come: by the P-th, or by its own where they were there before.
    """
    kept, rows = kept.transpose(1, 2).contiguous(), rows.transpose(1, 2).contiguous()  # [N, Hk, ...]
    places, length = kept.shape[2], rows.shape[2]
    found = torch.full((*rows.shape[:2], places + length + 1), -1, dtype=torch.int32, device=rows.device)
    wanted = torch.arange(places, 0, -1, device=rows.device).expand(kept.shape)  # better keys yet to come: P - place
    for start in range(0, length, tile):
        new = rows[:, :, start : start + tile]
        own = torch.arange(new.shape[2], device=rows.device)
        lacking = torch.searchsorted(
            kept.flip(2), new.contiguous(), right=True
        )  # P less the better ones among the kept
        keys = torch.cat([kept, new], 2)
        come = (new.unsqueeze(2) > keys.unsqueeze(3)).cumsum(3, dtype=torch.int16)  # [N, Hk, P + C, C]
        at = (come < torch.cat([wanted, lacking], 2).unsqueeze(3)).sum(3)
        gone = (at < new.shape[2]) & (keys != LOWEST)
        at[:, :, places:] = torch.maximum(at[:, :, places:], own)
        number = torch.where(gone, number_of(keys), places + length)  # the last entry is nobody's
        found.scatter_(2, number, (at + start).int())
        kept = keys.topk(places, 2)[0]
    by_number = found.transpose(1, 2).split([places, length, 1], 1)
    by_kept, by_row = (part.clone(memory_format=torch.contiguous_format) for part in by_number[:2])
    return by_kept, by_row


@displaced.register_fake
def _(kept, rows, tile):
    return kept.new_empty(kept.shape, dtype=torch.int32), rows.new_empty(rows.shape, dtype=torch.int32)
