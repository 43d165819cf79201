"""Which keys are worth keeping: a learned score of every key, known when the key leaves the window."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lizard_layers.config import LOOK_AHEAD
from lizard_layers.parameters import Float32Module, float32_parameter
from lizard_layers.received import InWindow, ReceivedTerm, WindowForm, facts_of
from lizard_layers.received_bands import received_by
from lizard_layers.score_ring import RING, STATISTICS, NewFacts, through_ring
from lizard_layers.token_order import TokenOrder, sums_along_rows, wide
from lizard_ops import KeyScoreState, KeyScoreWeights, ReceivedInputs, key_score_step, without_autocast

INPUTS = LOOK_AHEAD + 2  # x at j - 1, j, j + 1 and j + 2
LEAST_NORM = 1e-6


class ScoreState(NamedTuple):
    """What is left of N sequences for the scores to come; its size does not depend on their lengths.

    With p = ``position``, the keys p - 2 and p - 1 wait for inputs to come, and key p has had the first of its own.
    S score_dim, Hk key heads, D head dim.
    """

    position: Tensor  # [N] int64, tokens seen
    inner: Tensor  # [N, 3, S] float32, sums over the inputs seen so far of keys p - 2, p - 1 and p
    linear: Tensor  # [N, 2, Hk] float32, linear terms of keys p - 2 and p - 1
    key_sum: Tensor  # [N, Hk, D] float64, sum of the keys seen, each of length one


class ReceivingState(NamedTuple):
    """A ``ScoreState`` where scores read what keys receive in their window of W keys."""

    position: Tensor
    inner: Tensor
    linear: Tensor
    key_sum: Tensor
    ring: Tensor  # [N, W, Hk, 7] float32, of the key at position p in place p % W: see ``score_ring``


def empty_score_state(
    num_sequences: int,
    score_dim: int,
    num_key_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    window: int | None = None,
) -> ScoreState | ReceivingState:
    """The state of scores of ``num_sequences`` sequences before their first token; dtype is that of the parameters.

    window: of the keys, where scores read what they receive there; else None.
    """

    def zeros(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.zeros(num_sequences, *shape, dtype=of, device=device)

    state = ScoreState(
        zeros(of=torch.int64),
        zeros(LOOK_AHEAD + 1, score_dim),
        zeros(LOOK_AHEAD, num_key_heads),
        zeros(num_key_heads, head_dim, of=torch.float64),
    )
    return state if window is None else ReceivingState(*state, zeros(window, num_key_heads, RING))


class KeyScore(Float32Module):
    """A number per key and key head: how much would be lost without the key once it has left the window.

    With x_j the layer's normalised input (zero before the start of a sequence), k_jh and v_jh key and value of head h
    before RoPE, |.| norms of at least 1e-6::

        s_jh = u_h . gelu(sum_{o = -1..2} W_o x_{j+o} + b) + a_h . (log |k_jh|, log |v_jh|, cos(k_jh, m_jh)) + c_h
        m_jh = mean over i <= j of k_ih / |k_ih|

    so a score reads the text up to LOOK_AHEAD = 2 tokens after its key and no further. With ``received`` it also reads
    what the key receives from the queries that see it in the window, and is known when the key leaves it: the
    statistics above and three of those (``lizard_layers.received``) add a ``ReceivedTerm`` to s_jh. Before training
    u = 0, a = (0, 0, -1) and the term is 0: the keys least like the mean key score highest (KeyDiff, arXiv 2504.15364).

    Parameters and arithmetic are float32 (float64 in a model of that dtype), the running sums of keys float64. Scores
    are differentiable in x, k, v and the parameters, also through a carried state. hidden_size: of x. score_dim: width
    S of the inner layer. seed: of W, a normal of variance 1 / (4 hidden_size). received: the window in which keys
    receive; None leaves the term out. ``delay``: how many tokens after its key a score is known. No gradient goes
    through what a key receives.

    Raises ValueError for sizes that are no positive integers, and a window of LOOK_AHEAD keys or fewer.
    """

    def __init__(
        self,
        hidden_size: int,
        num_key_heads: int,
        head_dim: int,
        score_dim: int = 128,
        seed: int = 0,
        received: WindowForm | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(hidden_size=hidden_size, num_key_heads=num_key_heads, head_dim=head_dim, score_dim=score_dim)
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {size!r}")
        self.hidden_size, self.num_key_heads, self.head_dim = hidden_size, num_key_heads, head_dim
        self.score_dim, self.seed = score_dim, seed
        self.inner_weight = float32_parameter(INPUTS, score_dim, hidden_size)
        self.inner_bias = float32_parameter(score_dim)
        self.outer_weight = float32_parameter(num_key_heads, score_dim)
        self.linear_weight = float32_parameter(num_key_heads, STATISTICS)
        self.bias = float32_parameter(num_key_heads)
        self.window_form, self.received, self.delay = received, None, LOOK_AHEAD
        if received is not None:
            if received.window <= LOOK_AHEAD:
                raise ValueError(f"received: got a window of {received.window}, wanted at least {LOOK_AHEAD + 1}")
            self.received = ReceivedTerm(num_key_heads, seed=seed)
            self.delay = received.window - 1
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            draw = torch.Generator().manual_seed(self.seed)
            drawn = torch.randn(self.inner_weight.shape, generator=draw, device="cpu", dtype=torch.float32)
            self.inner_weight.copy_(drawn * (INPUTS * self.hidden_size) ** -0.5)
            for parameter in (self.inner_bias, self.outer_weight, self.linear_weight, self.bias):
                parameter.zero_()
            self.linear_weight[:, -1] = -1.0

    def rescale(self, scale: Tensor, shift: Tensor) -> None:
        """Make every score s_jh into scale_h s_jh + shift_h. scale, shift [Hk]."""
        with torch.no_grad():
            self.outer_weight.mul_(scale[:, None])
            self.linear_weight.mul_(scale[:, None])
            self.bias.copy_(self.bias * scale + shift)
            if self.received is not None:
                self.received.outer_weight.mul_(scale[:, None])

    def empty_state(self, num_sequences: int, device: torch.device | str | None = None) -> ScoreState | ReceivingState:
        """The state of sequences before their first token."""
        where = self.bias.device if device is None else device
        window = None if self.window_form is None else self.window_form.window
        return empty_score_state(
            num_sequences, self.score_dim, self.num_key_heads, self.head_dim, self.bias.dtype, where, window
        )

    def forward(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        state: ScoreState | ReceivingState | None = None,
        use_state: bool = False,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seen: InWindow | None = None,
        inplace: bool = False,
        impl: str = "auto",
    ) -> tuple[Tensor, ScoreState | ReceivingState | None]:
        """The scores that become known with the new tokens: in the place of token t stands that of key t - ``delay``.

        Where there is no such key, at the first tokens of a sequence, stands 0, and so at padding. Laid end to end,
        the scores of a text read in pieces are those of the whole: equal but for the rounding of matrix products of
        other shapes. As ``lizard_ops.key_expiry`` counts its keys, ``key_expiry(scores, window - delay, anchors +
        delay, kept_keys)`` gives, in the place of token t, the query that first misses key t - delay of a window of
        ``window`` keys; it takes the same padding_mask and cu_seqlens, and the two states go together.

        Args:
            x: [B, T, hidden_size], the layer's normalised input, any floating dtype.
            k: [B, T, Hk, D], projected keys before RoPE.
            v: [B, T, Hk, Dv], projected values, Dv of any size.
            state: what an earlier call left; None at the start of a text.
            use_state: return the state after the last token.
            padding_mask: [B, T] bool, True at real tokens, anywhere in a row; padding does not exist.
            cu_seqlens: [N + 1] int32 or int64, the ends of N sequences packed into one row (B = 1), from 0 to T.
            seen: with ``received`` alone, queries and keys as the window branch sees them; its ring_k and anchor_k are
                those of the layer's state before these tokens.
            inplace: overwrite ``state``, which must be contiguous and in no graph of gradients, and return it.
            impl: of ``lizard_ops.key_score_step``, which reads single tokens; longer texts are PyTorch's.

        Returns:
            scores [B, T, Hk] in the parameters' dtype, and a ``ScoreState`` (with ``received`` a ``ReceivingState``) of
            N (or B) sequences if it was asked for.

        Raises:
            ValueError: a tensor of another shape, dtype or device than the above; padding_mask beside cu_seqlens; ends
                that do not rise from 0 to T (values on a CPU alone); a state of another module or number of sequences;
                inplace without a state; an impl that cannot do what was asked.
        """
        self._check(x, k, v, padding_mask, cu_seqlens)
        self._check_seen(k, seen, state is not None)
        if inplace and state is None:
            raise ValueError("inplace: got True, wanted False without a state to overwrite")
        count = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        single = x.shape[1] == 1 and cu_seqlens is None and (seen is None or seen.ring_k is not None)
        if state is None:
            state = self.empty_state(count, x.device)
        else:
            self._check_state(state, None if single else count, x.device)
        if x.shape[1] == 0:
            return x.new_zeros(*x.shape[:2], self.num_key_heads, dtype=self.bias.dtype), state if use_state else None
        with without_autocast(x):
            x = x.to(self.bias.dtype)
            if not single:
                k, v = (t.to(self.bias.dtype) for t in (k, v))
            if padding_mask is not None:  # a padded token may hold NaN, which zero gradients would not cancel
                x, k, v = (t.masked_fill(~wide(padding_mask, t), 0.0) for t in (x, k, v))
                if seen is not None:
                    q, turned = (t.masked_fill(~wide(padding_mask, t), 0.0) for t in seen[:2])
                    seen = seen._replace(q=q, k=turned)
            if single:
                scores, new = self._step(x, k, v, state, seen, padding_mask, inplace, impl)
            else:
                order = TokenOrder.of(x, padding_mask, cu_seqlens)
                scores, new = self._read(x, k, v, state, order, seen, use_state or inplace)
                new = overwritten(state, new) if inplace else new
        return scores, new if use_state else None

    def statistics(self, k: Tensor, v: Tensor) -> Tensor:
        """Log norm of key and value and likeness to the mean key, [B, T, Hk, 3], of texts given from their start.

        k [B, T, Hk, D] before RoPE, v [B, T, Hk, Dv].
        """
        k, v = k.to(self.bias.dtype), v.to(self.bias.dtype)
        return _statistics(k, v, sums_along_rows(F.normalize(k, dim=-1, eps=LEAST_NORM).double()))

    def facts(self, k: Tensor, v: Tensor, seen: InWindow) -> Tensor:
        """What the ``ReceivedTerm`` reads, [B, T, Hk, 6], of texts given from their start; no gradient.

        The last window - 1 keys have not received all yet.
        """
        assert self.window_form is not None
        order = TokenOrder.of(k, None, None)
        with torch.no_grad(), without_autocast(k):
            got = received_by(seen, self.window_form, order, order.counts * 0)
            row = torch.arange(k.shape[0], device=k.device)[:, None]
            sums = got.collected(row, order.rank, order.rank, order.counts[:, None] - 1, self.window_form.stride)
            return facts_of(self.statistics(k, v), sums.to(self.bias.dtype))

    def _step(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        state: ScoreState | ReceivingState,
        seen: InWindow | None,
        padding_mask: Tensor | None,
        inplace: bool,
        impl: str,
    ) -> tuple[Tensor, ScoreState | ReceivingState]:
        """One token of each sequence. k and v of any dtype."""
        sums = F.linear(x, self.inner_weight.flatten(0, 1))
        weights = KeyScoreWeights(self.inner_bias, self.outer_weight, self.linear_weight, self.bias)
        inputs = None
        if seen is not None and seen.ring_k is not None and self.received is not None and self.window_form is not None:
            form = self.window_form
            term = self.received.weights()
            inputs = ReceivedInputs(
                seen.q, seen.k, seen.ring_k, seen.anchor_k, term, form.stride, form.scale, form.softcap
            )
        scores, new = key_score_step(
            sums, k, v, weights, KeyScoreState(*state), received=inputs, padding_mask=padding_mask, inplace=inplace,
            impl=impl,
        )  # fmt: skip
        if new.ring is None:
            return scores, ScoreState(*new[:4])
        return scores, ReceivingState(*new[:4], new.ring)

    def _read(
        self,
        x: Tensor,
        k: Tensor,
        v: Tensor,
        state: ScoreState | ReceivingState,
        order: TokenOrder,
        seen: InWindow | None,
        use_state: bool,
    ) -> tuple[Tensor, ScoreState | ReceivingState]:
        inner = F.linear(x, self.inner_weight.flatten(0, 1))  # [B, T, 4 S]: one product for all inputs
        k, v, inner = order.arrange(k), order.arrange(v), order.arrange(inner)
        first, second, third, fourth = inner.unflatten(-1, (INPUTS, -1)).unbind(-2)

        sums = order.running_sum(F.normalize(k, dim=-1, eps=LEAST_NORM).double(), state.key_sum)
        statistics = _statistics(k, v, sums)
        linear = torch.einsum("bthf,hf->bth", statistics, self.linear_weight)
        earlier = order.before(linear, state.linear[:, 1])  # in the place of token t: of key t - 1
        known = order.before(earlier, state.linear[:, 0])  # of key t - 2

        one = first  # of key t + 1, which has one of its inputs
        two = order.before(one, state.inner[:, 2]) + second  # of key t
        three = order.before(two, state.inner[:, 1]) + third  # of key t - 1
        four = order.before(three, state.inner[:, 0]) + fourth  # of key t - 2

        scores = F.linear(F.gelu(four + self.inner_bias), self.outer_weight) + known + self.bias
        positions = order.positions(state.position)
        scores = scores.masked_fill(~wide(positions >= LOOK_AHEAD, scores), 0.0)
        new = ScoreState(
            state.position + order.counts,
            torch.stack([order.last(t, state.inner[:, i]) for i, t in enumerate((three, two, one))], 1),
            torch.stack([order.last(t, state.linear[:, i]) for i, t in enumerate((earlier, linear))], 1),
            order.last(sums, state.key_sum),
        )
        if isinstance(state, ReceivingState):
            assert self.received is not None and self.window_form is not None and seen is not None
            facts, form = NewFacts(statistics, scores), self.window_form
            leaving, ring = through_ring(facts, seen, form, order, state.position, state.ring, use_state)
            scores = leaving.base + self.received(facts_of(leaving.statistics, leaving.sums))
            scores = scores.masked_fill(~wide(positions >= self.delay, scores), 0.0)
            return order.restore(scores), ReceivingState(*new, ring)
        return order.restore(scores), new

    def _check_seen(self, k: Tensor, seen: InWindow | None, later: bool) -> None:
        form = self.window_form
        if form is None or seen is None:
            if (form is None) != (seen is None):
                raise ValueError(
                    "seen: got None, wanted queries and keys of the window: scores read what keys receive there"
                    if seen is None
                    else "seen: got queries and keys, wanted None: received=None reads nothing of the window"
                )
            return
        heads = seen.q.shape[2] if seen.q.ndim == 4 else -1
        if heads < 1 or heads % self.num_key_heads:
            _refuse("seen.q", seen.q, f"[B, T, a multiple of {self.num_key_heads}, {self.head_dim}]")
        shapes = ("q", seen.q, (*k.shape[:2], heads, self.head_dim)), ("k", seen.k, tuple(k.shape))
        for name, tensor, shape in shapes:
            if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.device != k.device:
                _refuse(f"seen.{name}", tensor, f"a floating tensor of shape {shape} on {k.device}")
        rings = ("ring_k", seen.ring_k, form.window), ("anchor_k", seen.anchor_k, form.anchors)
        for name, ring, size in rings:
            if ring is None:
                if later and size:
                    raise ValueError(f"seen.{name}: got None, wanted that of the layer's state beside a state")
            elif tuple(ring.shape[1:]) != (size, *k.shape[2:]) or ring.device != k.device:
                _refuse(f"seen.{name}", ring, f"[N, {size}, {self.num_key_heads}, {self.head_dim}] on {k.device}")

    def _check(self, x: Tensor, k: Tensor, v: Tensor, padding_mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
        batch, length = x.shape[:2] if x.ndim == 3 else (-1, -1)
        value_dim = v.shape[-1] if v.ndim else -1
        wanted = {
            "x": (x, (batch, length, self.hidden_size)),
            "k": (k, (batch, length, self.num_key_heads, self.head_dim)),
            "v": (v, (batch, length, self.num_key_heads, value_dim)),
        }
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape or not tensor.is_floating_point() or tensor.device != x.device:
                _refuse(name, tensor, f"a floating tensor of shape {shape} on {x.device}")
        if padding_mask is not None:
            if cu_seqlens is not None:
                _refuse("padding_mask", padding_mask, "None with cu_seqlens: packed rows hold no padding")
            if padding_mask.shape != x.shape[:2] or padding_mask.dtype != torch.bool or padding_mask.device != x.device:
                _refuse("padding_mask", padding_mask, f"a bool tensor of shape {(batch, length)} on {x.device}")
        if cu_seqlens is None:
            return
        integers = cu_seqlens.dtype in (torch.int32, torch.int64) and cu_seqlens.device == x.device
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or not integers:
            _refuse("cu_seqlens", cu_seqlens, f"an int32 or int64 tensor [N + 1] on {x.device}, N >= 1")
        if batch != 1:
            _refuse("x", x, "one row (B = 1) with cu_seqlens")
        if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
            ends = cu_seqlens.tolist()
            if ends[0] != 0 or ends[-1] != length or ends != sorted(ends):
                raise ValueError(f"cu_seqlens: got {ends}, wanted 0 first, never falling, {length} last")

    def _check_state(self, state: ScoreState | ReceivingState, count: int | None, device: torch.device) -> None:
        """The state is of this module and ``count`` sequences; None leaves its tensors to the op of single tokens."""
        kind = ScoreState if self.received is None else ReceivingState
        if not isinstance(state, kind):
            raise ValueError(f"state: got a {type(state).__name__}, wanted a {kind.__name__} or None")
        if count is None:
            return
        for name, came, wanted in zip(state._fields, state, self.empty_state(count, "meta"), strict=True):
            if came.shape != wanted.shape or came.dtype != wanted.dtype or came.device != device:
                _refuse(f"state.{name}", came, f"a {wanted.dtype} tensor of shape {tuple(wanted.shape)} on {device}")


def overwritten(state: ScoreState | ReceivingState, new: ScoreState | ReceivingState) -> ScoreState | ReceivingState:
    """``state`` with the values of ``new``."""
    for field, value in zip(state, new, strict=True):
        field.copy_(value)
    return state


def _statistics(k: Tensor, v: Tensor, sums: Tensor) -> Tensor:
    """[B, T, H, 3] of keys and values, given the running sums [B, T, H, D] of keys of length one."""
    norms = [torch.linalg.vector_norm(t, dim=-1).clamp(min=LEAST_NORM).log() for t in (k, v)]
    return torch.stack([*norms, F.cosine_similarity(k, sums.to(k.dtype), dim=-1, eps=LEAST_NORM)], -1)


def _refuse(name: str, came: Tensor, wanted: str) -> None:
    raise ValueError(f"{name}: got shape {tuple(came.shape)} {came.dtype} on {came.device}, wanted {wanted}")
