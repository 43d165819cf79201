"""A text that lies over the ranks of a process group: what a forward of a part leaves out, and how to cut a batch.

Shapes: B batch, T positions.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right
from transformers.cache_utils import Cache

from lizard_ops import earlier_tokens

IGNORED = -100  # label of a position that predicts nothing


def check_part(
    decoder: Any, tokens: Tensor | None, attention_mask: Tensor | None, cache: Cache | None, use_cache: bool | None,
    context_group: Any,
) -> None:  # fmt: skip
    """Raises ValueError for what a decoder cannot do on a part of a text, and says why.

    The teacher's softmax asks every other rank how long its part is, and waits for the answers.
    """
    if cache is not None or use_cache:
        raise ValueError("context_group: a part of a text leaves no cache: leave past_key_values and use_cache out")
    check_layers(decoder, decoder.mode)
    if decoder.mode == "student" or tokens is None:
        return
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(f"attention_mask: got padding, wanted full rows in mode {decoder.mode!r} with context_group")
    lengths = every_rank(tokens.new_tensor([tokens.shape[1]], dtype=torch.int64), context_group).flatten().tolist()
    if len(set(lengths)) > 1:
        raise ValueError(
            f"input_ids: got parts of {lengths} positions, wanted as many on every rank in mode {decoder.mode!r}"
        )


def check_layers(decoder: Any, mode: str) -> None:
    """Raises ValueError where a decoder's layers cannot read parts of texts in this mode."""
    if decoder.has_softmax_layers:
        raise ValueError("context_group: kept softmax layers need the keys of all ranks; convert every layer")
    softmax = mode != "student"
    kinds = {decoder.rotary_emb.type_of(kind) for kind in decoder.rotary_emb.kinds()}
    by_length = kinds & ({"longrope", "dynamic"} if softmax else {"longrope"})
    if by_length:
        named = by_length.pop()
        raise ValueError(f"context_group: RoPE of the kind {named} chooses its angles by the length of the whole text")
    softcap = any(attention.softcap is not None for attention in decoder.lizard_attentions())
    if softmax and (softcap or not decoder.causal_without_mask):
        raise ValueError(
            f'context_group: in mode "{mode}" the teacher attends to the keys of all ranks: wanted '
            'attn_implementation="sdpa" and a teacher without sliding windows and soft caps'
        )


def every_rank(x: Tensor, context_group: Any) -> Tensor:
    """x [...] of every rank, [R, ...], without a gradient."""
    group = group_of(context_group)
    found = x.new_empty(group.size(), *x.shape)
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13
    gather(found.view(-1), x.detach().contiguous().view(-1), group=group)
    return found


def group_of(context_group: Any) -> Any:
    """The process group of a mesh, or the group itself."""
    return context_group.get_group() if isinstance(context_group, DeviceMesh) else context_group


def softmax_over_ranks(q: Tensor, k: Tensor, v: Tensor, scale: float, context_group: Any) -> Tensor:
    """Causal softmax attention of a part's queries over the keys of its rank and all before it, parts being as long.

    q [B, T, Hq, D], k and v [B, T, Hk, D] -> o [B, T, Hq, D]. Every rank is sent all keys and values, of a teacher that
    does not learn: a ValueError where a gradient is asked for. The last rank has most to do.
    """
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError(
            "context_group: the teacher's softmax over ranks has no gradient; call it under torch.no_grad()"
        )
    rank, group = group_of(context_group).rank(), q.shape[2] // k.shape[2]
    length = k.shape[1]

    def up_to_here(x: Tensor) -> Tensor:  # [B, T, Hk, D] -> [B, Hq, (r + 1) T, D]
        of_ranks = every_rank(x, context_group)[: rank + 1]
        return of_ranks.permute(1, 3, 0, 2, 4).flatten(2, 3).repeat_interleave(group, 1)

    causal: Any = causal_lower_right(length, (rank + 1) * length)
    keys, values = up_to_here(k), up_to_here(v)
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, causal, scale=scale).transpose(1, 2)


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
    group = group_of(context_group)
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
        whole["shift_labels"] = F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    own: dict[str, Any] = {name: x.tensor_split(ranks, 1)[rank].contiguous() for name, x in whole.items()}
    return own | {"context_group": context_group}
