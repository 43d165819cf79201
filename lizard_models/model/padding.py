"""Padding masks of a forward: checked, completed, and what stands where there is padding.

Shapes: B batch, T new positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lizard_models.model.graphs import is_graphed


def placeholder_mask(tokens: Tensor) -> Tensor:
    """A 4-D mask that no layer reads: transformers takes it as it is and builds none of [T, T]."""
    return tokens.new_zeros(1, 1, 1, 1, dtype=torch.bool)


def check_padding_mask(attention_mask: Tensor | None, batch: int, past: int | None, length: int) -> Tensor | None:
    """The mask [B, past + T] as bool, or None. Raises ValueError for another shape; past None is not known."""
    if attention_mask is None:
        return None
    columns = attention_mask.shape[-1] if past is None else past + length
    if attention_mask.shape != (batch, columns) or columns < length:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, wanted [{batch}, {columns}]: "
            f"one column for each of the {columns - length} cached and {length} new positions"
        )
    return attention_mask.bool()


def new_columns(t: Tensor, length: int, first: Tensor | int | None) -> Tensor:
    """The ``length`` columns of t [B, C] that are of the new positions: from ``first`` on, or the last of them."""
    if first is None:
        return t[:, t.shape[1] - length :]
    return t.index_select(1, first + torch.arange(length, device=t.device))


def refuse_gaps(padding_mask: Tensor) -> None:
    """Raises ValueError for padding [B, T] between real tokens. Reads the data, but in a graph.

    A kept sliding-window layer is transformers' own, which counts such padding as positions of its window.
    """
    if is_graphed(padding_mask):
        return
    starts = padding_mask.clone()
    starts[:, 1:] &= ~padding_mask[:, :-1]
    rows = starts.sum(1) > 1
    if bool(rows.any()):
        raise ValueError(
            f"attention_mask has padding between the real tokens of row {int(rows.nonzero()[0])}, which the kept "
            "sliding-window layers would count: pad on the left, or convert with keep_sliding_layers=False"
        )


def all_real(padding_mask: Tensor | None) -> bool:
    """Whether no position is padding, so that layers may skip the mask. Reads the data, once a forward."""
    return padding_mask is None or (not torch.compiler.is_compiling() and bool(padding_mask.all()))


def repeat_over_padding(hidden: Tensor, padding_mask: Tensor) -> Tensor:
    """hidden [B, T, ...] with that of the last real token wherever padding [B, T] follows one.

    So the last position of a right-padded row predicts what its last token predicts.
    """
    places = torch.arange(hidden.shape[1], device=hidden.device)
    last = torch.where(padding_mask, places, -1).cummax(1).values
    source = torch.where(last < 0, places, last)
    return hidden.gather(1, source.unsqueeze(-1).expand_as(hidden))
