"""Several sequences in one row: where each begins, and the row of real tokens the attention reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from lizard_models.model.layer_configs import sliding_windows


class Packing(NamedTuple):
    """The real tokens of a batch [B, T], row after row, as one packed row of N tokens in S sequences."""

    cu_seqlens: Tensor  # [S + 1] int32, ends of the sequences
    places: Tensor | None  # [N] int64, places of the real tokens in [B * T]; None: every place

    def pack(self, x: Tensor) -> Tensor:
        """x [B, T, ...] -> [1, N, ...]."""
        flat = x.flatten(0, 1)
        return (flat if self.places is None else flat.index_select(0, self.places)).unsqueeze(0)

    def unpack(self, x: Tensor, like: Tensor) -> Tensor:
        """x [1, N, ...] -> [B, T, ...] as ``like``, zero at padding."""
        if self.places is None:
            return x.view_as(like)
        return x.new_zeros(like.flatten(0, 1).shape).index_copy(0, self.places, x.squeeze(0)).view_as(like)

    @torch.compiler.disable(reason="how long packed sequences are is known on the host")
    def spans(self, positions: Tensor) -> tuple[list[int], list[int]]:
        """The first position of each sequence and its number of tokens, of positions [B, T]. Reads the data."""
        begins = self.cu_seqlens[:-1].long()
        return self.pack(positions)[0].index_select(0, begins).tolist(), self.cu_seqlens.diff().tolist()


def find_packing(position_ids: Tensor, batch: int, real: Tensor | None) -> Packing | None:
    """How a batch is packed, or None where no row holds two sequences.

    A sequence ends where the position ids [B or 1, T] of real tokens [B, T] stop rising by one, or the row ends.
    Reads the data, once a forward.
    """
    positions = position_ids.expand(batch, -1)
    rows = torch.arange(batch, device=positions.device).unsqueeze(1).expand_as(positions)
    positions, rows = (t.flatten() if real is None else t[real] for t in (positions, rows))
    new_row = rows.diff() != 0
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[1:] = (positions.diff() != 1) | new_row
    if int(starts.sum()) <= int(new_row.sum()) + 1:
        return None
    ends = torch.tensor([starts.numel()], device=starts.device)
    cu_seqlens = torch.cat([starts.nonzero().squeeze(-1), ends]).int()
    return Packing(cu_seqlens, None if real is None else real.flatten().nonzero().squeeze(-1))


@torch.compiler.disable(
    reason="where packed sequences begin is read from the position ids: leave them out, or no fullgraph"
)
def find_packing_outside(position_ids: Tensor, batch: int, real: Tensor | None) -> Packing | None:
    """``find_packing`` where a graph is traced that may be left for it."""
    return find_packing(position_ids, batch, real)


RESTART = (
    "position_ids (or cu_seq_lens_q, seq_idx) restart within a row: packed sequences are read eagerly, or under "
    "torch.compile without fullgraph and without a cache. In one graph leave them out and give one text a row"
)


def one_text(position_ids: Tensor, real: Tensor | None) -> Tensor:
    """[] bool, whether every row is one text. position_ids [B or 1, T], real [B, T] bool or None."""
    if real is None:
        return (position_ids.diff(dim=-1) == 1).all()
    steps = position_ids - real.long().cumsum(-1)  # constant over the real tokens of one text
    first = steps.expand(real.shape).gather(1, real.int().argmax(-1, keepdim=True))
    return ((steps == first) | ~real).all()


def assert_one_text(position_ids: Tensor, real: Tensor | None) -> None:
    """Makes a graph fail when it runs on packed rows, of which it knows nothing. Reads nothing back.

    Arguments as for ``one_text``. Raises RuntimeError then, on a GPU as its assertion.
    """
    torch._assert_async(one_text(position_ids, real), RESTART)


def trace_one_text(packing: Packing | None, position_ids: Tensor, real: Tensor | None) -> Tensor:
    """position_ids for torch.jit.trace, to which it is a constant where texts begin.

    Packed rows are refused, now with ValueError and when the trace runs with RuntimeError.
    """
    if packing is not None:
        raise ValueError(
            f"position_ids: got {int(packing.cu_seqlens.shape[0]) - 1} texts in {int(position_ids.shape[0])} "
            "rows, wanted one a row under torch.jit.trace, which would read every batch as packed like this one: "
            "torch.compile reads packed rows"
        )
    nothing = position_ids.new_zeros(())  # a trace drops an assertion on which nothing depends
    return position_ids + torch.ops.aten._functional_assert_async.msg(one_text(position_ids, real), RESTART, nothing)


def positions_of_documents(kwargs: dict[str, Any], length: int) -> Tensor | None:
    """Position ids [B, T] from the boundaries that data collators give in place of them, or None.

    kwargs: a forward's; ``cu_seq_lens_q`` [S + 1] (B = 1) or ``seq_idx`` [B, T] int.
    """
    ends, documents = kwargs.get("cu_seq_lens_q"), kwargs.get("seq_idx")
    if ends is not None:
        places = torch.arange(length, device=ends.device)
        starts = ends[torch.bucketize(places, ends[1:-1].contiguous(), right=True)]
        return (places - starts).unsqueeze(0)
    if documents is not None:
        places = torch.arange(length, device=documents.device).expand_as(documents)
        changes = torch.zeros_like(documents, dtype=torch.bool)
        changes[:, 1:] = documents.diff() != 0
        return places - torch.where(changes, places, 0).cummax(1).values
    return None


def packed_mask(packing: Packing, padding_mask: Tensor, dtype: torch.dtype, config: PreTrainedConfig) -> Tensor:
    """The additive mask [B, 1, T, T] of softmax attention over packed and padded rows. Padding sees itself.

    Raises ValueError for attention implementations that take no such mask, and layers that need another one.
    """
    if config._attn_implementation not in ("eager", "sdpa"):
        raise ValueError(
            f"attn_implementation={config._attn_implementation!r} takes no packed rows with padding in softmax layers: "
            'use "sdpa" or "eager", or leave the padding out'
        )
    if any(sliding_windows(config)):
        raise ValueError("packed rows with padding, in softmax layers with a sliding window: leave the padding out")
    assert packing.places is not None
    lengths = packing.cu_seqlens.diff().long()
    names = torch.arange(1, len(lengths) + 1, device=padding_mask.device).repeat_interleave(lengths)
    documents = torch.zeros(padding_mask.numel(), dtype=torch.long, device=padding_mask.device)
    documents = documents.index_copy(0, packing.places, names).view_as(padding_mask)
    same = (documents.unsqueeze(2) == documents.unsqueeze(1)) & padding_mask.unsqueeze(2)
    seen = same.tril() | torch.eye(padding_mask.shape[1], dtype=torch.bool, device=padding_mask.device)
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min).unsqueeze(1)
