"""A sequence that lies over ranks: who leaves the state, and that of the scores of keys.

A score reads three tokens back, and with ``received`` the windows of the queries of its window, and the mean of all
keys so far. So a rank asks for the sum of all earlier keys and reads the last few earlier tokens again: what it makes
of the first of these is wrong and kept by nothing, and the state after the last of them is that of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_layers.anchor_block import AnchorBlock
from lizard_layers.config import LOOK_AHEAD, AttentionConfig
from lizard_layers.key_score import LEAST_NORM, KeyScore, ReceivingState, ScoreState
from lizard_layers.packed_blocks import PackedBlock
from lizard_layers.read_input import read_input
from lizard_layers.received import InWindow
from lizard_layers.state import LayerState, State
from lizard_layers.token_order import wide
from lizard_ops import context_state, earlier_tokens, without_autocast

if TYPE_CHECKING:
    from lizard_layers.hybrid_attention import HybridAttention


class EarlierRanks(NamedTuple):
    """In the place of a state: it is what the ranks before this one leave of a sequence that lies over all of them."""

    group: Any
    """As ``context_group`` of ``lizard_ops.chunk_hybrid_attn``: a ProcessGroup, or a DeviceMesh of one dimension."""


@torch.no_grad()
def earlier_scores(
    module: KeyScore,
    x: Tensor,
    k: Tensor,
    v: Tensor,
    seen: InWindow | None,
    padding_mask: Tensor | None,
    context_group: Any,
) -> tuple[ScoreState | ReceivingState, InWindow | None]:
    """(state of the score, ``seen`` with the ring and the anchors) that earlier ranks leave to this part.

    The arguments are as for ``KeyScore.forward``; seen without a ring. One exchange.
    """
    own = F.normalize(k.to(module.bias.dtype), dim=-1, eps=LEAST_NORM).double()
    if padding_mask is not None:
        own = own.masked_fill(~wide(padding_mask, own), 0.0)
    form, count = module.window_form, LOOK_AHEAD + 1
    last, first = [(t, count) for t in (x, k, v)], []
    if form is not None and seen is not None:
        count = 2 * form.window
        last = [(t, count) for t in (x, k, v, seen.q, seen.k)]
        first = [(seen.k, form.anchors)] if form.anchors else []
    got = earlier_tokens(
        last=last, first=first, sums=[own.sum(1)], padding_mask=padding_mask, context_group=context_group
    )
    there = got.there(count)
    before = (got.position - count).clamp(min=0)
    again = F.normalize(got.last[1].to(module.bias.dtype), dim=-1, eps=LEAST_NORM).double()
    again = again.masked_fill(~wide(there, again), 0.0).sum(1)
    state = module.empty_state(len(before), x.device)
    # where all that there is is read again, the sum before it is nothing, whatever the difference rounds to
    key_sum = torch.where(wide(before, again) > 0, got.sums[0] - again, 0.0)
    state = state._replace(position=before, key_sum=key_sum)
    window = None
    if form is not None and seen is not None:
        q, turned = got.last[3:]
        # the ring of the tokens read again, of which nothing that is kept reads
        blank = turned.new_zeros(len(turned), form.window, *turned.shape[2:])
        anchors = got.first[0] if got.first else None
        window = InWindow(q, turned, blank, anchors)
        seen = seen._replace(ring_k=got.ring(turned[:, count - form.window :]), anchor_k=anchors)
    _, state = module(*got.last[:3], state, True, there, None, window)
    return state, seen


def check_blocks(config: AttentionConfig, blocks: Sequence[AnchorBlock | PackedBlock]) -> None:
    """Raises ValueError for what a rank cannot know: which keys are kept where earlier blocks have dropped some."""
    if config.kept_past == "moved" or not config.keeps_keys:
        return
    if any(bool(block.moved.any()) for block in blocks if isinstance(block, AnchorBlock)):
        raise ValueError(
            'state: got EarlierRanks past position_limit with kept_past="dropped", wanted a sequence up to it, or '
            'kept_past="moved": which keys a block keeps depends on what the blocks before it dropped'
        )


def state_of_earlier_ranks(layer: HybridAttention, tokens: Any, context_group: Any) -> State:
    """The state that the ranks before this one leave to ``layer``. tokens: of this rank."""
    config = layer.config
    shared: dict[str, Any] = dict(anchors=config.anchors, padding_mask=tokens.padding_mask, context_group=context_group)
    if not config.linear_branch:
        q, k = layer.turn(config.window_rope, tokens.q, tokens.k, tokens.rope)
        return context_state(q, k, tokens.v, None, None, None, config.window, **shared)
    with without_autocast(tokens.x):
        others = dict(initial_state=None, output_final_state=False, cu_seqlens=None)
        read = read_input(layer, tokens.x, tokens.k)
        inputs, choices, (_, score) = layer.op_inputs(tokens, read, None, shared | others, False)
        names = (*shared, "coverage", "feature_map", "scores", "score_delay", "kept_keys")
        state = context_state(*inputs, config.window, **{name: choices[name] for name in names})
    return state if score is None else LayerState(state, score)
