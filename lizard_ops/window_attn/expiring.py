"""Which keys live on beyond their window, block by block of queries, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def living(expiry: Tensor, blocks: int, size: int, back: int, places: int, prefix: int = 0) -> Tensor:
    """[B, Hk, blocks, places]: keys before those that a block of queries reaches, but alive at its first; -1 for none.

    expiry [B, T, Hk], counted from the first query, 0 or less for what is no such key ever; the first ``prefix`` keys
    are before it. Block n has queries n size and later, and reaches the keys from (n - back) size on. A key is in the
    list of an interval of blocks: every pair of key and block has a number, the pairs are sorted by block, and no list
    is longer than ``places``.
    """
    batch, length, heads = expiry.shape
    ends, device = expiry.clamp(max=blocks * size).movedim(2, 1), expiry.device  # [B, Hk, T]
    first = (torch.arange(-prefix, length - prefix, device=device) // size + back + 1).clamp(min=0)  # block
    stays = ((ends + size - 1) // size - first).clamp(min=0)  # blocks that start before the key expires
    last = stays.cumsum(-1)
    pair = torch.arange(blocks * places, device=device).expand(batch, heads, -1).contiguous()
    key = torch.searchsorted(last, pair, right=True)
    real, key = key < length, key.clamp(max=max(length - 1, 0))
    block = first[key] + pair - (last - stays).gather(-1, key)
    code = torch.where(real, block * length + key, blocks * length).sort(-1)[0]
    starts = (torch.arange(blocks + 1, device=device) * length).expand(batch, heads, -1).contiguous()
    begin = torch.searchsorted(code, starts)  # of each block's pairs
    slot = begin[..., :-1, None] + torch.arange(places, device=device)
    found = code.gather(-1, slot.clamp(max=max(blocks * places - 1, 0)).flatten(2)).view(slot.shape) % max(length, 1)
    return found.masked_fill(slot >= begin[..., 1:, None], -1)


def most_living(expiry: Tensor, window: int) -> list[int]:
    """The most keys of each head that are alive beyond the window at one query; expiry as for ``living``."""
    length = expiry.shape[1]
    begin = (torch.arange(length, device=expiry.device) + window).view(1, -1, 1).expand_as(expiry)
    lives = expiry > begin
    change = expiry.new_zeros(expiry.shape[0], length + 1, expiry.shape[2])
    change = change.scatter_add(1, begin.clamp(max=length), lives.long())
    change = change.scatter_add(1, expiry.clamp(max=length), -lives.long())
    return change.cumsum(1)[:, :length].amax((0, 1)).tolist() if length else [0] * expiry.shape[2]


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """[B, H, n, P, D]: the rows of x [B, T, H, D] that index [B, H, n, P] names; any row where it is -1.

    By indices, whose gradient is summed in one order on every device.
    """
    batch, length, heads, _ = x.shape
    row = torch.arange(batch, device=x.device).view(-1, 1, 1, 1)
    head = torch.arange(heads, device=x.device).view(1, -1, 1, 1)
    return x[row, index.clamp(min=0), head] if length else x.new_zeros(*index.shape, x.shape[3])
