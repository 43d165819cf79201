"""How far the anchors have moved on, for positions past the teacher's context, and kept keys with them or no more."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops import EMPTY_VALUES, AttentionState, apply_rotary, apply_rotary_by, overwrite_state


class AnchorBlock(NamedTuple):
    """New positions whose queries see the anchors moved on by the same amount."""

    length: int  # new positions, padding included
    cos: Tensor  # [B or 1, 1, D] of the angles by which the anchors move on; 1 where they do not
    sin: Tensor  # the same
    moved: Tensor  # [B or 1] bool, False where the row has not reached position_limit
    shift: Tensor  # [B or 1] int64, by how many positions they move on
    frequencies: Tensor  # [D / 2] radians a position, of either half of D
    filled: bool = False  # whether every row is known to have all its anchors, so that none is written any more


def turn_by(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [..., D] float32 of angles computed in float64, of positions [...] and frequencies [D / 2]."""
    angles = positions.to(frequencies.device)[..., None].double() * frequencies.double()
    angles = torch.cat([angles, angles], -1)
    return angles.cos().float(), angles.sin().float()


def moved_on(state: AttentionState, block: AnchorBlock, dropped: bool = False, inplace: bool = False) -> AttentionState:
    """The state with its anchors and kept keys as the queries of ``block`` see them.

    Anchor a stands at block.shift + a, and a kept key j at max(j, block.shift), so that none is further away than the
    newest anchor was. dropped: a kept key j < block.shift is none any more, and the others stand where they stood.
    inplace: overwrite the fields by which ``state`` says so.
    """
    if state.anchor_k is not None:
        state = state._replace(anchor_k=apply_rotary(state.anchor_k, block.cos, block.sin))
    held = state.kept_positions
    if state.kept_k is None or held is None:
        return state
    shift = block.shift.view(-1, *[1] * (held.ndim - 1))
    if dropped:
        return _without(state, held < shift, inplace)
    keys = state.kept_k.flatten(1, -2)
    behind = (shift - held).clamp(min=0).flatten(1)
    turned = apply_rotary_by(keys, behind, block.frequencies)  # empty places are zero, however turned
    held = held.clone()  # a step in place overwrites those it is given, and ``moved_back`` compares
    return state._replace(kept_k=turned.view_as(state.kept_k), kept_positions=held)


def _without(state: AttentionState, gone: Tensor, inplace: bool) -> AttentionState:
    """The state without the kept keys at these places, of the shape of its ``kept_positions``."""
    told = {}
    for name in ("kept_positions", "kept_scores"):
        field = getattr(state, name)
        told[name] = (field.masked_fill_ if inplace else field.masked_fill)(gone, EMPTY_VALUES[name])
    return state._replace(**told)


def moved_back(
    new: AttentionState, old: AttentionState, block: AnchorBlock, places: int | tuple[int, ...] | None
) -> AttentionState:
    """``new``, which a call left of ``moved_on(old)``, with the keys that ``old`` had as it had them.

    Nothing is turned back, so that no rounding adds up. places: of each key head, where they differ; None where
    kept keys were not turned.
    """
    if new.anchor_k is not None and old.anchor_k is not None:
        new = new._replace(anchor_k=torch.where(block.moved[:, None, None, None], old.anchor_k, new.anchor_k))
    fields = [x for x in (new.kept_k, new.kept_positions, old.kept_k, old.kept_positions) if x is not None]
    if len(fields) < 4 or places is None:
        return new
    if isinstance(places, int):
        return new._replace(kept_k=as_they_were(*fields))
    by_head = zip(*(x.unsqueeze(2).split(places, 1) for x in fields), strict=True)
    parts = [as_they_were(*head).squeeze(2) for head in by_head if head[0].shape[1]]
    return new._replace(kept_k=torch.cat(parts, 1))


def stepped_back(new: AttentionState, held: AttentionState, block: AnchorBlock, turned: bool) -> AttentionState:
    """``moved_back`` of what one token has written in place, in the memory of ``held``, which is returned.

    A token takes one place at most of a head's kept keys and leaves the others where they are, so that places are
    compared one by one. turned: whether kept keys were.
    """
    if held.anchor_k is not None and new.anchor_k is not None:
        if not block.filled:
            moved = block.moved[:, None, None, None]
            torch.where(moved, held.anchor_k, new.anchor_k, out=held.anchor_k)
        new = new._replace(anchor_k=held.anchor_k)
    if turned and held.kept_k is not None and held.kept_positions is not None:
        assert new.kept_k is not None and new.kept_positions is not None
        same = (new.kept_positions == held.kept_positions).unsqueeze(-1)
        torch.where(same, held.kept_k, new.kept_k, out=held.kept_k)
        new = new._replace(kept_k=held.kept_k)
    return overwrite_state(held, new)


def as_they_were(new_k: Tensor, new_positions: Tensor, old_k: Tensor, old_positions: Tensor) -> Tensor:
    """new_k [N, P, H, D] with the keys of old_k that stand at the same positions [N, P, H]."""
    same = new_positions.unsqueeze(2) == old_positions.unsqueeze(1)  # [N, P, P, H]
    same = same & (old_positions >= 0).unsqueeze(1)
    held, place = same.max(2)  # of the place in ``old``, where it had the key
    before = old_k.gather(1, place.unsqueeze(-1).expand_as(new_k))
    return torch.where(held.unsqueeze(-1), before, new_k)
