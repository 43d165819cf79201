"""The step of one text on a CPU with kept keys by what they receive: ``one_text.py`` with places, coverage "left".

Leaving keys fill the places of a head in order, so that Python knows how many there are; afterwards a head's worst is
looked for only where the key that leaves scores higher.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lizard_ops.common.numerics import soft_capped
from lizard_ops.common.places import most
from lizard_ops.common.state import AttentionState
from lizard_ops.hybrid_attn.arguments import HybridOptions
from lizard_ops.hybrid_attn.one_text import TINY, OneText, Scores, as_factors, features, places
from lizard_ops.key_score.arguments import KeyScoreState, KeyScoreWeights, ReceivedWeights
from lizard_ops.key_score.one_text import OneTextScore


class ScoreOf(NamedTuple):
    """Parameters of a layer's scores that read what keys receive."""

    inner_weight: Tensor  # [4 S, hidden], of o = -1, 0, 1, 2
    weights: KeyScoreWeights
    term: ReceivedWeights
    stride: int


class _Places(NamedTuple):
    """Views of what a head keeps, P places."""

    k: Tensor  # [P, D]
    v: Tensor  # [P, V]
    scores: Tensor  # [P]
    positions: Tensor  # [P]


class KeptText(OneText):
    """As ``OneText``, of a state with kept keys and that of their scores."""

    __slots__ = (
        "alike", "anchor_factors", "filled", "kept_factors", "log_scale", "most", "places", "positions", "ring_scores",
        "score", "scored", "scored_places",
    )  # fmt: skip

    def __init__(self, state: AttentionState, score: KeyScoreState, options: HybridOptions, stride: int) -> None:
        super().__init__(state, options)
        assert state.ring_scores is not None and state.log_scale is not None and state.ring_k is not None
        self.score, self.scored, self.scored_places = OneTextScore(score, stride), score, places(score)
        with torch.inference_mode(state.ring_k.is_inference()), torch.no_grad():
            self.ring_scores, self.log_scale = state.ring_scores[0, 0], state.log_scale[0]
            fields = [getattr(state, f"kept_{name}")[0] for name in ("k", "v", "scores", "positions")]
            if isinstance(options.kept_keys, tuple):
                parts = zip(*(t.split(list(options.kept_keys)) for t in fields), strict=True)
            else:
                parts = zip(*(t.unbind(1) for t in fields), strict=True)
            self.places = [_Places(*of_head) for of_head in parts]
            self.alike, self.most = not isinstance(options.kept_keys, tuple), most(options.kept_keys)
            self.filled: tuple[int, Scores] | None = None  # places that are, and their scores
            if self.alike:
                self.kept_factors = as_factors(*fields[:2])
            self.positions = [self.position, score[0]]
            if options.anchors:
                self.anchor_factors = as_factors(self.anchor_k, self.anchor_v)

    def holds_both(self, state: AttentionState, score: KeyScoreState, options: HybridOptions, stride: int) -> bool:
        """Whether these are the views of these states, where they lie now."""
        same = stride == self.score.stride and all(a is b for a, b in zip(self.scored, score, strict=True))
        return same and places(score) == self.scored_places and self.holds(state, options)

    def in_order(self, position: int) -> bool:
        """Whether the places are filled from the first on, as steps leave them."""
        for place in self.places:
            filled = min(max(position - self.options.window - self.options.anchors, 0), len(place.scores))
            if not bool((place.positions[:filled] >= 0).all()) or bool((place.positions[filled:] >= 0).any()):
                return False
        return True

    def kept_step(
        self,
        position: int,
        heads: tuple[Tensor, Tensor, Tensor],  # q [Hq, D], k [Hk, D], turned, and v [Hk, V]
        fq: Tensor | None,  # [Hq, Fp], None unless a key ``joins``
        fk: Tensor,  # [Hk, Fp]
        g: Tensor,  # [Hg]
        merge_bias: Tensor | None,  # [Hq]
        k: Tensor,  # [Hk, D] before RoPE
        sums: Tensor,  # [4 S] of the scores
        score: ScoreOf,
    ) -> Tensor:
        """o [Hk, G, V] of the token at ``position``, with both states overwritten."""
        options, old = self.options, self.slot(position)
        q, turned_k, v = heads
        count, far = v.shape[0], None
        old[3].copy_(g)
        if fq is not None:
            self._keep(position, old)
            far = self._far_kept(old, fq, g, count)
        torch._foreach_copy_(old[:3], [turned_k, v, fk])
        if position < options.anchors:
            self.anchor_k[position], self.anchor_v[position] = turned_k, v
        o, weights, scores = self._near_and_kept(position, q, count)
        near = options.window + options.anchors
        scored = self.score.step(position, sums, k, v, score.weights, score.term, scores[..., :near])
        if scored is not None:
            self.ring_scores.copy_(scored)
        torch._foreach_add_(self.positions, 1)
        if far is None:
            return o
        total, mass = far
        log = torch.threshold(mass, TINY[mass.dtype], 0.0).mul_(weights[..., :near].amax(-1, keepdim=True)).log_()
        log += self.log_scale.view(-1, 1, 1)
        if merge_bias is not None:
            log += merge_bias.view(count, -1, 1)
        if options.feature_scale != 1:
            log += math.log(options.feature_scale)
        if options.merge_mass == "absolute":
            log -= scores[..., :near].amax(-1, keepdim=True)
        return torch.lerp(o, total.div_(mass.clamp_(min=TINY[mass.dtype])), log.sigmoid_())

    def _keep(self, position: int, old: list[Tensor]) -> None:
        """Let the key that leaves the window take the place of each head's worst, where it scores higher."""
        left = position - self.options.window
        scores = self.ring_scores.tolist()
        for head, (place, score) in enumerate(zip(self.places, scores, strict=True)):
            at, size = left - self.options.anchors, len(place.scores)
            if at < size and place.positions[at] >= 0:
                raise ValueError(f"state.kept_positions: got a key in place {at} of head {head}, wanted none yet there")
            if at >= size:
                worst = place.scores.min().item() if size else math.inf
                if not score > worst:
                    continue
                among = (place.scores == worst).nonzero().view(-1)
                at = int(among[place.positions[among].argmax()])  # of several the last, as an equal one would have lost
            place.k[at], place.v[at] = old[0][head], old[1][head]
            place.scores[at], place.positions[at] = score, left

    def _far_kept(self, old: list[Tensor], fq: Tensor, g: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Sums [Hk, G, V] and mass [Hk, G, 1] of the queries, decayed up to the newest token."""
        phi = features(torch.cat([fq, old[2]]), self.options.feature_map)  # [Hq + Hk, F]
        passed, held = self.ring_g.sum(0), self.log_scale + g
        torch.maximum(held, passed, out=self.log_scale)
        held = held.sub_(self.log_scale).exp_().unsqueeze(-1)  # [Hk, 1]
        joining = phi[-heads:] * (passed - self.log_scale).exp_().unsqueeze(-1)
        self.s.mul_(held.unsqueeze(-1)).addcmul_(joining.unsqueeze(-1), old[1].unsqueeze(1))
        torch.addcmul(joining, self.z, held, out=self.z)
        queries = phi[:-heads].view(heads, -1, phi.shape[1])
        return torch.bmm(queries, self.s), torch.bmm(queries, self.z_column)

    def _near_and_kept(self, position: int, q: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(o [Hk, G, V], weights, scores [Hk, G, M]) of the keys in the window's places, then of anchors that have left
        it, then of kept keys, -inf where a head has fewer; the latter two until the next step."""
        options = self.options
        window, anchors = options.window, options.anchors
        left = max(position - window - anchors + 1, 0)
        if not left:
            return self._near(position, q, heads)
        queries = (q * options.scale).view(heads, -1, q.shape[1])
        if self.alike and (self.filled is None or self.filled[0] != min(left, self.most)):
            seen = min(left, self.most)
            parts = [(self.near_k, self.near_v)] + ([self.anchor_factors] if anchors else [])
            parts += [(self.kept_factors[0][..., :seen], self.kept_factors[1][:, :seen])]
            self.filled = seen, self.scores(queries, parts)
        if self.alike and self.filled is not None:
            return self.filled[1].attend(queries, options.softcap)
        return self._of_each(left, queries)

    def _of_each(self, left: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``_near_and_kept`` where heads have different numbers of places."""
        options, begin = self.options, self.options.window + self.options.anchors
        near = [(self.near_k, self.near_v)] + ([self.anchor_factors] if options.anchors else [])
        scores = queries.new_full((*queries.shape[:2], begin + self.most), -math.inf)
        end = 0
        for keys, _ in near:
            scores[..., end : end + keys.shape[2]] = soft_capped(torch.bmm(queries, keys), options.softcap)
            end += keys.shape[2]
        kept = [(h, place, min(left, len(place.scores))) for h, place in enumerate(self.places)]
        for h, place, seen in kept:
            scores[h, :, begin : begin + seen] = soft_capped(torch.mm(queries[h], place.k[:seen].t()), options.softcap)
        weights, end = scores.softmax(-1), options.window
        o = torch.bmm(weights[..., :end], self.near_v)
        if options.anchors:
            o.baddbmm_(weights[..., end:begin], self.anchor_factors[1])
        for h, place, seen in kept:
            o[h].addmm_(weights[h, :, begin : begin + seen], place.v[:seen])
        return o, weights, scores


_texts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the position of their states


def kept_text_of(
    state: AttentionState, score: KeyScoreState, options: HybridOptions, stride: int, check: Callable[[], None]
) -> KeptText | None:
    """``text_of`` these states; None where places are not filled in their order."""
    text = _texts.get(state.position)
    if text is None or not text.holds_both(state, score, options, stride):
        check()
        text = KeptText(state, score, options, stride)
        if not text.in_order(int(state.position)):
            return None
        _texts[state.position] = text
    return text
