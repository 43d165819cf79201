"""The step of one text on a CPU: a single row, whose position Python knows, with few operators and no masks.

What the general step looks up, hides and fills by the position (slots that hold a key, anchors that left the window,
whether a key joins the sums) is here a slice or a branch, and every product is over the key heads with the query heads
of a group as rows. The sums and the window are joined without log-masses: with w the softmax weights of the exact keys
and w* the largest of those in window and anchors, lse - m = -log w*.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lizard_ops.common.checks import has_values, work_dtype
from lizard_ops.common.direct import is_watched
from lizard_ops.common.numerics import soft_capped
from lizard_ops.common.state import AttentionState
from lizard_ops.hybrid_attn.arguments import HybridInputs, HybridOptions

TINY = {dtype: torch.finfo(dtype).tiny for dtype in (torch.float32, torch.float64)}
Pair = tuple[Tensor, Tensor]
HELD = ("s", "z", "ring_k", "ring_v", "ring_fk")  # by every state that a step here takes


def takes_one_text(inputs: HybridInputs, options: HybridOptions) -> bool:
    """Whether ``OneText`` has this call, which comes checked, with a state that may be overwritten."""
    q, g, state = inputs.q, inputs.g, inputs.initial_state
    if q.shape[:2] != (1, 1) or q.device.type != "cpu" or state is None or is_watched():
        return False
    if inputs.cu_seqlens is not None or inputs.padding_mask is not None or inputs.scores is not None:
        return False
    if not takes_options(options) or inputs.sinks is not None:
        return False
    if g is not None and (g.ndim != 3 or g.shape[2] > inputs.k.shape[2]):
        return False
    work = work_dtype(q)
    held = (*(getattr(state, name) for name in HELD), state.anchor_k, state.anchor_v, state.ring_g)
    alike = all(x.dtype == work for x in (q, inputs.k, inputs.v, inputs.fq, inputs.fk, *held) if x is not None)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in inputs.tensors())
    return alike and not recorded and has_values(state.position)


def takes_options(options: HybridOptions) -> bool:
    """Whether ``OneText`` computes what these ask for."""
    kinds = options.coverage == "outside" and options.mix == "merge" and options.kept_keys in (None, 0)
    return kinds and options.feature_map in ("identity", "softmax")


class OneText:
    """A state of one row, and its parts as a step reads and writes them; Hk key heads, G query heads a group.

    Views of the state's memory, made once: a step of a small model takes little longer than they do.
    """

    __slots__ = (
        "anchor_k", "anchor_v", "fields", "memory", "near_k", "near_v", "options", "position", "ring_g", "ring_k",
        "ring_v", "rings", "s", "slots", "whole", "z", "z_column",
    )  # fmt: skip

    def __init__(self, state: AttentionState, options: HybridOptions) -> None:
        self.fields, self.options, self.memory = state[1:], options, places(state)
        self.position = state.position
        assert state.s is not None and state.z is not None
        with torch.inference_mode(state.s.is_inference()), torch.no_grad():
            parts: dict[str, Any] = {name: None if x is None else x[0] for name, x in state._asdict().items()}
            self.ring_k, self.ring_v, self.ring_g = parts["ring_k"], parts["ring_v"], parts["ring_g"]
            self.rings = [x for x in (self.ring_k, self.ring_v, parts["ring_fk"], self.ring_g) if x is not None]
            self.slots: list[list[Tensor] | None] = [None] * options.window  # of each ring, once it was stepped on
            self.anchor_k, self.anchor_v = parts["anchor_k"], parts["anchor_v"]
            self.s, self.z = parts["s"], parts["z"]  # [Hk, F, V] and [Hk, F]
            self.z_column = state.z[0].unsqueeze(-1)
            self.near_k, self.near_v = as_factors(self.ring_k, self.ring_v)
            self.whole: Scores | None = None  # once the window and all that is beside it are full

    def holds(self, state: AttentionState, options: HybridOptions) -> bool:
        """Whether these are the views of this state, where it lies now."""
        same = options is self.options or options == self.options
        return (
            same and all(a is b for a, b in zip(self.fields, state[1:], strict=True)) and places(state) == self.memory
        )

    def slot(self, position: int) -> list[Tensor]:
        """What the rings hold of the token a window before ``position``: key, value, features, gates if there are."""
        place = position % self.options.window
        found = self.slots[place]
        if found is None:
            with torch.inference_mode(self.s.is_inference()), torch.no_grad():
                found = self.slots[place] = [ring[place] for ring in self.rings]
        return found

    def joins(self, position: int) -> bool:
        """Whether the key that leaves the window with the token at ``position`` is no anchor, and enters the sums."""
        return position >= self.options.window + self.options.anchors

    def step(
        self,
        position: int,
        q: Tensor,  # [Hq, D]
        k: Tensor,  # [Hk, D]
        v: Tensor,  # [Hk, V]
        fq: Tensor | None,  # [Hq, Fp], None unless a key ``joins``
        fk: Tensor,  # [Hk, Fp]
        g: Tensor | None,  # [Hg]
        merge_bias: Tensor | None,  # [Hq]
    ) -> Tensor:
        """o [Hk, G, V] of the token at ``position``, with the state overwritten but for its position."""
        options, heads, old = self.options, k.shape[0], self.slot(position)
        sums = mass = None
        if fq is not None:
            sums, mass = self._far(old, fq, heads)
        torch._foreach_copy_(old, [k, v, fk] if g is None else [k, v, fk, g])
        if position < options.anchors:
            self.anchor_k[position], self.anchor_v[position] = k, v
        o, weights, scores = self._near(position, q, heads)
        if sums is None or mass is None:
            return o
        tiny = TINY[mass.dtype]
        log = torch.threshold(mass, tiny, 0.0).mul_(weights.amax(-1, keepdim=True)).log_()
        if g is not None:
            log += self.ring_g.sum(0).view(-1, 1, 1)
        if merge_bias is not None:
            log += merge_bias.view(heads, -1, 1)
        if options.feature_scale != 1:
            log += math.log(options.feature_scale)
        if options.merge_mass == "absolute":
            log -= scores.amax(-1, keepdim=True)
        return torch.lerp(o, sums.div_(mass.clamp_(min=tiny)), log.sigmoid_())

    def _far(self, old: list[Tensor], fq: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """Sums [Hk, G, V] and mass [Hk, G, 1] of the queries, once the oldest key has joined."""
        phi = features(torch.cat([fq, old[2]]), self.options.feature_map)  # [Hq + Hk, F]
        phi_k = phi[-heads:]
        if self.ring_g is not None:
            kept = old[3].exp().unsqueeze(-1)  # [Hg, 1]
            self.s.mul_(kept.unsqueeze(-1))
            torch.addcmul(phi_k, self.z, kept, out=self.z)
        else:
            self.z.add_(phi_k)
        self.s.addcmul_(phi_k.unsqueeze(-1), old[1].unsqueeze(1))
        queries = phi[:-heads].view(heads, -1, phi.shape[1])
        return torch.bmm(queries, self.s), torch.bmm(queries, self.z_column)

    def _near(self, position: int, q: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """(o [Hk, G, V], weights, scores [Hk, G, M]) of window and anchors; where these are full, the latter until the
        next step."""
        window, anchors = self.options.window, self.options.anchors
        seen, far = min(position + 1, window), min(anchors, max(position - window + 1, 0))
        queries = (q * self.options.scale).view(heads, -1, q.shape[1])
        if seen == window and far == anchors:
            if self.whole is None:
                parts = [(self.near_k, self.near_v)] + ([as_factors(self.anchor_k, self.anchor_v)] if far else [])
                self.whole = self.scores(queries, parts)
            return self.whole.attend(queries, self.options.softcap)
        parts = [(self.near_k[..., :seen], self.near_v[:, :seen])]
        parts += [as_factors(self.anchor_k[:far], self.anchor_v[:far])] if far else []
        return self.scores(queries, parts).attend(queries, self.options.softcap)

    def scores(self, queries: Tensor, parts: list[Pair]) -> Scores:
        """``Scores``, in which steps may write as in the state."""
        with torch.inference_mode(self.s.is_inference()):
            return Scores(queries, parts)


class Scores:
    """Memory of a query's scores and weights with keys [Hk, D, M] of several places, and views of it for each.

    A view for each product, which are made once for as long as the places stay as many.
    """

    __slots__ = ("all", "parts", "parts_of_scores", "parts_of_weights", "weights")

    def __init__(self, queries: Tensor, parts: list[Pair]) -> None:
        sizes = [keys.shape[2] for keys, _ in parts]
        self.all, self.weights = (queries.new_empty(*queries.shape[:2], sum(sizes)) for _ in range(2))
        self.parts, self.parts_of_scores = parts, self.all.split(sizes, -1)
        self.parts_of_weights = self.weights.split(sizes, -1)

    def attend(self, queries: Tensor, softcap: float | None) -> tuple[Tensor, Tensor, Tensor]:
        """(o [Hk, G, V], weights, scores [Hk, G, sum of M])."""
        for out, (keys, _) in zip(self.parts_of_scores, self.parts, strict=True):
            torch.bmm(queries, keys, out=out)
        scores = soft_capped(self.all, softcap)
        torch.softmax(scores, -1, out=self.weights)
        o = torch.bmm(self.parts_of_weights[0], self.parts[0][1])
        for weights, (_, values) in zip(self.parts_of_weights[1:], self.parts[1:], strict=True):
            o.baddbmm_(weights, values)
        return o, self.weights, scores


def one_text_step(inputs: HybridInputs, options: HybridOptions) -> Tensor:
    """o [1, 1, Hq, V] of the next token. The state, position included, is overwritten."""
    state, q = inputs.initial_state, inputs.q
    assert state is not None
    position, text = int(state.position), OneText(state, options)
    fq = inputs.fq[0, 0] if text.joins(position) else None
    g, bias = (None if x is None else x.flatten() for x in (inputs.g, inputs.merge_bias))
    o = text.step(position, q[0, 0], inputs.k[0, 0], inputs.v[0, 0], fq, inputs.fk[0, 0], g, bias)
    state.position.add_(1)
    return o.view(1, 1, q.shape[2], -1)


_texts: WeakIdKeyDictionary = WeakIdKeyDictionary()  # by the position of their states


def text_of(state: AttentionState, options: HybridOptions, check: Callable[[], None]) -> OneText:
    """The views of a state: those of the step before where it is the same, elsewhere new ones after a ``check``."""
    text = _texts.get(state.position)
    if text is None or not text.holds(state, options):
        check()
        text = _texts[state.position] = OneText(state, options)
    return text


def places(state: Iterable[Tensor | None]) -> list[int]:
    """Where its tensors lie."""
    return [0 if x is None else x.data_ptr() for x in state]


def features(x: Tensor, feature_map: str) -> Tensor:
    """phi of x [H, Fp]: [H, F]."""
    if feature_map == "identity":
        return x
    return (x.unsqueeze(1) * signs(1, x.dtype)).softmax(-1).view(x.shape[0], -1)


@functools.cache
def signs(width: int, dtype: torch.dtype) -> Tensor:
    """1 and -1 [2, width], each so often."""
    with torch.inference_mode(False):
        return torch.tensor([[1.0], [-1.0]], dtype=dtype).repeat(1, width)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``apply_rotary`` of heads x [H, D] by angles [1, D]."""
    half = x.shape[1] // 2
    return (x * cos).addcmul_(x.roll(half, 1), sin * signs(half, sin.dtype).view(1, -1), value=-1)


def as_factors(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [M, Hk, D] and values [M, Hk, V] as [Hk, D, M] and [Hk, M, V]."""
    return k.permute(1, 2, 0), v.transpose(0, 1)
