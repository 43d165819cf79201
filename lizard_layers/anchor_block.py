"""How far the anchors have moved on, for positions past the teacher's context, and kept keys with them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lizard_ops import AttentionState, apply_rotary, apply_rotary_by


class AnchorBlock(NamedTuple):
    """New positions whose queries see the anchors moved on by the same amount."""

    length: int  # new positions, padding included
    cos: Tensor  # [B or 1, 1, D] of the angles by which the anchors move on; 1 where they do not
    sin: Tensor  # the same
    moved: Tensor  # [B or 1] bool, False where the row has not reached position_limit
    shift: Tensor  # [B or 1] int64, by how many positions they move on
    frequencies: Tensor  # [D / 2] radians a position, of either half of D


def turn_by(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """cos, sin [..., D] float32 of angles computed in float64, of positions [...] and frequencies [D / 2]."""
    angles = positions.to(frequencies.device)[..., None].double() * frequencies.double()
    angles = torch.cat([angles, angles], -1)
    return angles.cos().float(), angles.sin().float()


def moved_on(state: AttentionState, block: AnchorBlock) -> AttentionState:
    """The state with its anchors and kept keys as the queries of ``block`` see them.

    Anchor a stands at block.shift + a, and a kept key j at max(j, block.shift), so that none is further away than the
    newest anchor was.
    """
    if state.anchor_k is not None:
        state = state._replace(anchor_k=apply_rotary(state.anchor_k, block.cos, block.sin))
    if state.kept_k is not None and state.kept_positions is not None:
        behind = (block.shift.view(-1, 1, 1) - state.kept_positions).clamp(min=0)
        keys = state.kept_k.flatten(1, 2)
        turned = apply_rotary_by(keys, behind.flatten(1), block.frequencies)  # empty places are zero, however turned
        held = state.kept_positions.clone()  # a step in place overwrites those it is given, and ``moved_back`` compares
        state = state._replace(kept_k=turned.view_as(state.kept_k), kept_positions=held)
    return state


def moved_back(new: AttentionState, old: AttentionState, block: AnchorBlock) -> AttentionState:
    """``new``, which a call left of ``moved_on(old)``, with the keys that ``old`` had as it had them.

    Nothing is turned back, so that no rounding adds up.
    """
    if new.anchor_k is not None and old.anchor_k is not None:
        new = new._replace(anchor_k=torch.where(block.moved[:, None, None, None], old.anchor_k, new.anchor_k))
    if new.kept_k is None or old.kept_k is None or new.kept_positions is None or old.kept_positions is None:
        return new
    same = new.kept_positions.unsqueeze(2) == old.kept_positions.unsqueeze(1)  # [N, P, P, Hk]
    same = same & (old.kept_positions >= 0).unsqueeze(1)
    held, place = same.max(2)  # of the place in ``old``, where it had the key
    before = old.kept_k.gather(1, place.unsqueeze(-1).expand_as(new.kept_k))
    return new._replace(kept_k=torch.where(held.unsqueeze(-1), before, new.kept_k))
