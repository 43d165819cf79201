"""A text that lies over the ranks of a process group: what a forward of a part leaves out, and how to cut a batch.

Shapes: B batch, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from lizard_ops import earlier_tokens

IGNORED = -100  # label of a position that predicts nothing


def check_part(decoder: Any, cache: Cache | None, use_cache: bool | None) -> None:
    """Raises ValueError for what a decoder cannot do on a part of a text, and says why."""
    if decoder.mode != "student":
        raise ValueError(
            f'context_group: got mode {decoder.mode!r}, wanted "student": softmax needs the keys of all ranks'
        )
    if decoder.has_softmax_layers:
        raise ValueError("context_group: kept softmax layers need the keys of all ranks; convert every layer")
    if cache is not None or use_cache:
        raise ValueError("context_group: a part of a text leaves no cache: leave past_key_values and use_cache out")
    kinds = [decoder.rotary_emb.type_of(kind) for kind in decoder.rotary_emb.kinds()]
    if "longrope" in kinds:
        raise ValueError("context_group: RoPE of the kind longrope chooses its angles by the length of the whole text")


def part_positions(tokens: Tensor, padding_mask: Tensor | None, context_group: Any) -> Tensor:
    """Positions [B, T] of a part's tokens [B, T, ...] in its text, real tokens counted, by one exchange."""
    before = earlier_tokens(context_group=context_group, padding_mask=padding_mask, last=[(tokens, 0)]).position
    if padding_mask is None:
        return before.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
    return (before.unsqueeze(1) + padding_mask.long().cumsum(1) - 1).clamp(min=0)


def context_part(batch: dict[str, Tensor], context_group: Any) -> dict[str, Tensor]:
    """What this rank reads of a batch that every rank holds whole: arguments of a model's forward.

    Parts are consecutive, those of the first ranks longer by one where the length is no multiple of their number. The
    keyword ``context_group`` is among them, and positions; labels are shifted before they are cut, so that the last
    position of a part predicts the first of the next.

    Args:
        batch: input_ids [B, T], and attention_mask and labels [B, T] if wanted, equal on all ranks.
        context_group: as for ``lizard_ops.chunk_gated_attn``.

    Raises ValueError for a tensor of another shape or name, and fewer positions than ranks.
    """
    ids = batch.get("input_ids")
    if ids is None or ids.ndim != 2:
        raise ValueError(f"batch: got {sorted(batch)}, wanted input_ids [B, T] among them")
    others = set(batch) - {"input_ids", "attention_mask", "labels"}
    wrong = [name for name, x in batch.items() if x.shape != ids.shape]
    if others or wrong:
        named = ", ".join(sorted(others) + wrong)
        raise ValueError(f"batch: got {named}, wanted input_ids, attention_mask and labels of one shape")
    group = context_group.get_group() if hasattr(context_group, "get_group") else context_group
    ranks, rank, length = group.size(), group.rank(), ids.shape[1]
    if length < ranks:
        raise ValueError(f"batch: got {length} positions for {ranks} ranks, wanted one at least for each")
    mask = batch.get("attention_mask")
    positions = torch.arange(length, device=ids.device).expand_as(ids)
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    whole = {"input_ids": ids, "position_ids": positions}
    whole |= {} if mask is None else {"attention_mask": mask}
    if "labels" in batch:
        whole["labels"] = batch["labels"]
        whole["shift_labels"] = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    own: dict[str, Any] = {name: x.tensor_split(ranks, 1)[rank].contiguous() for name, x in whole.items()}
    return own | {"context_group": context_group}
