"""The attention layer of a Lizard model: gated linear attention and a sliding window under one mix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lizard_layers.anchor_block import AnchorBlock, moved_back, moved_on, stepped_back
from lizard_layers.config import AttentionConfig
from lizard_layers.earlier_ranks import EarlierRanks, check_blocks, earlier_scores, state_of_earlier_ranks
from lizard_layers.feature_map import FeatureMaps
from lizard_layers.gate import build_gate
from lizard_layers.key_score import KeyScore, ReceivingState, ScoreState
from lizard_layers.meta_memory import MetaMemory
from lizard_layers.mix import MergeMix, SumMix
from lizard_layers.one_text import step_of_one_text, takes_text_step
from lizard_layers.packed_blocks import PackedBlock, by_kind, read_packed
from lizard_layers.read_input import Heads, Read, read_input, read_token
from lizard_layers.read_text import read_text
from lizard_layers.received import InWindow, WindowForm
from lizard_layers.state import LayerState, State, overwrite_layer_state, state_of, tensors_of
from lizard_ops import (
    AttentionState,
    PoolRows,
    chunk_hybrid_attn,
    overwrite_state,
    recurrent_hybrid_attn,
    rotary_both,
    window_attn,
    without_autocast,
)

KERNELS = ("auto", "triton")  # implementations of the config with which one op may stand for several
_OfOp = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]  # q, k, v, fq, fk, g


class _Tokens(NamedTuple):
    """The new positions of a call, as ``HybridAttention.forward`` takes them."""

    x: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    rope: tuple[Tensor, Tensor] | None
    padding_mask: Tensor | None

    def part(self, where: slice | Tensor) -> _Tokens:
        """Those at the positions ``where`` alone."""

        def of(t: Tensor) -> Tensor:
            return t[:, where] if isinstance(where, slice) else t.index_select(1, where)

        rope = None if self.rope is None else (of(self.rope[0]), of(self.rope[1]))
        mask = None if self.padding_mask is None else of(self.padding_mask)
        return _Tokens(of(self.x), of(self.q), of(self.k), of(self.v), rope, mask)


class PagedState(NamedTuple):
    """The states of N sequences in pages of a pool."""

    pool: State  # its tensors are [P, ...], packed as ``page_layout`` has them, or each contiguous
    indices: Tensor  # [N] int32 or int64, the page of each, -1 for rows that are nobody's
    has_state: Tensor | None = None  # [N] bool, False for a sequence that begins; None: all go on


class HybridAttention(nn.Module):
    """What stands between the projections of an attention layer: from q, k, v to the heads' outputs.

    Formulas and choices: ``AttentionConfig``. Every parameter is new (the projections belong to the caller), float32
    and stays so. The output of a position depends on that position and earlier ones of its sequence only.
    """

    def __init__(self, config: AttentionConfig) -> None:
        super().__init__()
        self.config = config
        self.sinks = None
        if config.num_sinks:
            heads = config.num_heads if config.sinks_per_head else None
            self.sinks = MetaMemory(config.num_sinks, heads, config.sink_init, config.sink_spread)
        self.key_score = None
        if config.kept_keys:
            received = WindowForm.of(config) if config.score_received else None
            sizes = (config.hidden_size, config.num_key_heads, config.head_dim, config.score_dim)
            self.key_score = KeyScore(*sizes, received=received)
            self.key_score.requires_grad_(False)  # no gradient goes through the choice of keys
        if config.linear_branch:
            self.feature_maps = FeatureMaps(config)
            self.gate = build_gate(config)
            self.mix = MergeMix(config) if config.mix == "merge" else SumMix(config)
            readers = [m for m in (self.gate, self.mix) if m is not None]
            of_heads = config.linear_key_heads == config.num_key_heads and not config.kept_keys
            one_turn = config.window_rope and not config.linear_rope
            self.takes_heads = of_heads and one_turn and not self.feature_maps.one_sided and config.impl in KERNELS
            self.reads_input = any(p.ndim == 2 for m in readers for p in m.parameters())
        self.steps_at_once = takes_text_step(self)

    def forward(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor] | None = None,
        state: State | EarlierRanks | PagedState | None = None,
        use_state: bool = False,
        padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        anchor_blocks: Sequence[AnchorBlock | PackedBlock] | None = None,
        inplace: bool = False,
    ) -> tuple[Tensor, State | None]:
        """Attend over the new positions and what ``state`` remembers.

        x [B, T, hidden]: the layer's normalised input, for gate and merge bias. q [B, T, Hq, D], k and v [B, T, Hk, D]:
        projected heads before RoPE. rope: (cos, sin), each [B or 1, T, D], of these positions. padding_mask [B, T]
        bool, True at real tokens; cu_seqlens [N+1] packs N sequences into one row. anchor_blocks: for
        positions="clamped", how far anchors and kept keys have moved on, block by block of the new positions, with
        cu_seqlens ``PackedBlock``s; None: not at all.
        inplace: overwrite ``state``, which must be contiguous and in no graph of gradients, and return it.
        state: what an earlier call left; ``EarlierRanks`` where these positions are a rank's part of a sequence, of
        which rope and anchor_blocks are then too, without inplace and cu_seqlens. A ``PagedState`` is always
        overwritten, in the pages of these sequences and no others, and its pool returned; nobody's rows give 0.

        Returns o [B, T, Hq, D] in q's dtype, zero at padding, and the state after the last position if ``use_state``,
        else None: an ``AttentionState``, with kept keys a ``LayerState``. No gradient reaches the parameters of the
        score. Raises ValueError for shapes that do not fit the config, a state of another kind, or a choice of RoPE
        without ``rope``.
        """
        paged = state if isinstance(state, PagedState) else None
        state = state.pool if isinstance(state, PagedState) else state
        self._check(x, q, k, v, rope, state)
        plain = inplace and self.steps_at_once and padding_mask is None and cu_seqlens is None and anchor_blocks is None
        if plain and paged is None and (one := step_of_one_text(self, x, q, k, v, rope, state)) is not None:
            return one, state if use_state else None  # type: ignore[return-value]
        alone = state is None and padding_mask is None and cu_seqlens is None and anchor_blocks is None
        if alone and (read := read_text(self, x, q, k, v, rope, use_state)) is not None:
            return read
        tokens = _Tokens(x, q, k, v, rope, padding_mask)
        if isinstance(state, EarlierRanks):
            if state.group is None:
                raise ValueError("state: got EarlierRanks(None), wanted a process group or a mesh in it")
            if inplace or cu_seqlens is not None:
                name, came = ("inplace", True) if inplace else ("cu_seqlens", cu_seqlens)
                raise ValueError(f"{name}: got {came}, wanted none with EarlierRanks, which leave the state of a row")
            if anchor_blocks is None:
                return self._attend(tokens, None, use_state, None, False, context_group=state.group)
            check_blocks(self.config, anchor_blocks)
            state = state_of_earlier_ranks(self, tokens, state.group)
        if paged is not None:
            return self._in_pages(tokens, paged, cu_seqlens, anchor_blocks), state if use_state else None
        o, new = self._in_blocks(tokens, state, use_state, cu_seqlens, anchor_blocks, inplace)
        return o, overwrite_layer_state(state, new) if inplace and state is not None and new is not None else new

    def _in_pages(
        self,
        tokens: _Tokens,
        paged: PagedState,
        cu_seqlens: Tensor | None,
        anchor_blocks: Sequence[AnchorBlock | PackedBlock] | None,
    ) -> Tensor:
        """The outputs. The op reads and writes pages where it can; what it cannot is taken out and put back."""
        if torch.is_grad_enabled() and any(t.requires_grad for t in (*tokens[:4], *self.parameters())):
            raise ValueError(
                "state: got pages, which would be overwritten where gradients are recorded: torch.no_grad()"
            )
        state, config = paged.pool, self.config
        where_they_lie = config.linear_branch and not config.score_received and anchor_blocks is None
        if where_they_lie and isinstance(state, AttentionState):
            return self._attend(tokens, state, True, cu_seqlens, True, paged)[0]
        rows = PoolRows.of(paged.indices, paged.has_state)
        if where_they_lie:
            mine = {name: t for name, t in tensors_of(state).items() if name.startswith("score.")}
            held = tensors_of(_attention_of(state)) | {name: rows.take(name, t) for name, t in mine.items()}
            o, new = self._attend(tokens, state_of(held), True, cu_seqlens, True, paged)
        else:
            mine = tensors_of(state)
            held = {name: rows.take(name, t) for name, t in mine.items()}
            one = tokens.x.shape[1] == 1 and cu_seqlens is None
            o, new = self._in_blocks(tokens, state_of(held), True, cu_seqlens, anchor_blocks, one)
            o = rows.blanked(o, cu_seqlens)
        assert new is not None
        made = tensors_of(new)
        for name, t in mine.items():
            rows.put(t, made[name])
        return o

    def _in_blocks(
        self,
        tokens: _Tokens,
        state: State | None,
        use_state: bool,
        cu_seqlens: Tensor | None,
        anchor_blocks: Sequence[AnchorBlock | PackedBlock] | None,
        inplace: bool,
    ) -> tuple[Tensor, State | None]:
        if anchor_blocks is None:
            return self._attend(tokens, state, use_state, cu_seqlens, inplace)
        plain, packed = by_kind(anchor_blocks, cu_seqlens, tokens.x.shape[1])
        if packed:

            def read(block: PackedBlock, held: State | None, wanted: bool) -> tuple[Tensor, State | None]:
                part = tokens.part(block.tokens) if len(packed) > 1 else tokens
                return self._attend_moved(block.block, part, held, wanted, False, block.cu_seqlens)

            return read_packed(read, packed, state, use_state)
        outputs, end = [], 0
        for block in plain:
            part = tokens.part(slice(end, end := end + block.length))
            o, state = self._attend_moved(block, part, state, use_state or end < tokens.x.shape[1], inplace)
            outputs.append(o)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), state

    def _attend_moved(
        self,
        block: AnchorBlock,
        tokens: _Tokens,
        state: State | None,
        use_state: bool,
        inplace: bool,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """``_attend`` with anchors and kept keys moved on, or these dropped; the state keeps them as they were."""
        if state is None:
            return self._attend(tokens, None, use_state, cu_seqlens, inplace)
        held = _attention_of(state)
        if held.anchor_k is None and held.kept_k is None:
            return self._attend(tokens, state, use_state, cu_seqlens, inplace)
        dropped, step = self.config.kept_past == "dropped", inplace and block.length == 1
        overwrites = step and not torch.is_grad_enabled()  # else the op may refuse, and nothing must have changed
        seen = _with_attention(state, moved_on(held, block, dropped, overwrites))
        o, new = self._attend(tokens, seen, use_state, cu_seqlens, inplace)
        if new is None:
            return o, None
        if step:
            return o, _with_attention(new, stepped_back(_attention_of(new), held, block, not dropped))
        back = moved_back(_attention_of(new), held, block, None if dropped else self.config.places)
        return o, _with_attention(new, overwrite_state(held, back) if inplace else back)

    def _attend(
        self,
        tokens: _Tokens,
        state: State | None,
        use_state: bool,
        cu_seqlens: Tensor | None,
        inplace: bool,
        paged: PagedState | None = None,
        context_group: Any = None,
    ) -> tuple[Tensor, State | None]:
        config = self.config
        held = None if state is None else _attention_of(state)
        past = state.score if isinstance(state, LayerState) else None
        with without_autocast(tokens.x):
            shared: dict[str, Any] = dict(
                anchors=config.anchors, sinks=None if self.sinks is None else self.sinks(), sink_form=config.sink_form,
                scale=config.scale, softcap=config.softcap, initial_state=held, output_final_state=use_state,
                padding_mask=tokens.padding_mask, cu_seqlens=cu_seqlens, impl=config.impl, context_group=context_group,
            )  # fmt: skip
            if paged is not None:
                shared |= dict(state_indices=paged.indices, has_state=paged.has_state)
            score: ScoreState | ReceivingState | None = None
            if config.linear_branch:
                o, new, score = self._both_branches(tokens, past, shared, inplace)
            else:
                q, k = self.turn(config.window_rope, tokens.q, tokens.k, tokens.rope)
                o, new = window_attn(q, k, tokens.v, config.window, **shared)[:2]
            if new is None:
                return o, None
            new = overwrite_state(held, new) if inplace and held is not None else new
            return o, new if score is None else LayerState(new, score)

    def _both_branches(
        self, tokens: _Tokens, past: ScoreState | ReceivingState | None, shared: dict[str, Any], inplace: bool
    ) -> tuple[Tensor, AttentionState | None, ScoreState | ReceivingState | None]:
        """Window and linear branch under their mix. shared: what the window's op takes as well."""
        config, few = self.config, tokens.q.shape[1] == 1
        token = read_token(self, tokens.x, tokens.q, tokens.k, tokens.rope) if few else None
        read, heads = (read_input(self, tokens.x, tokens.k), None) if token is None else token
        inputs, choices, (score, _) = self.op_inputs(tokens, read, past, shared, inplace, heads)
        begins = choices.pop("has_state", None)
        if tokens.q.shape[1] == 1 and shared["initial_state"] is not None and begins is None:
            del choices["context_group"]
            o, new = recurrent_hybrid_attn(*inputs, config.window, **choices, inplace=inplace)
            return o, new, score
        o, new = chunk_hybrid_attn(*inputs, config.window, gate_form=config.gate_form, **choices, has_state=begins)
        return o, new, score

    def op_inputs(
        self, tokens: _Tokens, read: Read, past: ScoreState | ReceivingState | None, shared: dict[str, Any],
        inplace: bool, heads: Heads | None = None,
    ) -> tuple[_OfOp, dict[str, Any], tuple[ScoreState | ReceivingState | None, ...]]:  # fmt: skip
        """((q, k, v, fq, fk, g), options of the op, the state of the score after the tokens and before them)."""
        config, (_, q, k, v, rope, _), (x, g, mixed) = self.config, tokens, read
        if config.linear_key_heads != k.shape[2]:
            group = config.num_heads // config.num_key_heads
            k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
            if g is not None and config.gate in ("key_head", "mamba2", "pooling"):
                g = g.repeat_interleave(group, 2)
        if heads is not None:
            q, k, fq, fk = heads
        elif config.linear_rope and not config.window_rope:
            _, _, fq, fk = self.feature_maps(*self.turn(True, q, k, rope))
        else:
            q, k, fq, fk = self.feature_maps(*self.turn(config.linear_rope, q, k, rope), reuse_gradient=True)
            q, k = self.turn(config.window_rope and not config.linear_rope, q, k, rope)
        overwrites = inplace and not torch.is_grad_enabled()  # else the op may refuse, and nothing must have changed
        scores, *score = self._scores(tokens._replace(x=x), q, k, past, shared, overwrites)
        choices = self._choices(mixed, shared) | {"scores": scores}
        choices |= dict(score_delay=0 if scores is None else config.score_delay, kept_keys=config.places)
        return (q, k, v, fq, fk, g), choices, tuple(score)

    def _choices(self, mixed: dict[str, Any], shared: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the hybrid ops."""
        config = self.config
        return dict(
            mix=config.mix, coverage=config.coverage, feature_map=self.feature_maps.op_feature_map,
            normalize=config.normalize, feature_scale=config.feature_scale, **mixed, **shared,
        )  # fmt: skip

    @torch.no_grad()
    def _scores(
        self,
        tokens: _Tokens,
        q: Tensor,
        k: Tensor,
        past: ScoreState | ReceivingState | None,
        shared: dict[str, Any],
        inplace: bool,
    ) -> tuple[Tensor | None, ScoreState | ReceivingState | None, ScoreState | ReceivingState | None]:
        """Scores of keys for the op, before it overwrites the ring that they read, and their states after and before.

        q, k: as the window sees them.
        """
        if self.key_score is None:
            return None, None, None
        config, held, seen, wanted = self.config, shared["initial_state"], None, shared["output_final_state"]
        group = config.linear_key_heads // config.num_key_heads
        if config.score_received:
            rings = (None, None) if held is None else (held.ring_k, held.anchor_k)
            of_heads = (t if t is None or group == 1 else t[:, :, ::group] for t in (k, *rings))
            seen = InWindow(q, *of_heads)
        mask, context_group = tokens.padding_mask, shared["context_group"]
        if context_group is not None:
            past, seen = earlier_scores(self.key_score, tokens.x, tokens.k, tokens.v, seen, mask, context_group)
        scores, new = self.key_score(
            tokens.x, tokens.k, tokens.v, past, wanted, mask, shared["cu_seqlens"], seen,
            inplace and wanted and past is not None, config.impl,
        )  # fmt: skip
        return scores if group == 1 else scores.repeat_interleave(group, 2), new, past

    @staticmethod
    def turn(wanted: bool, q: Tensor, k: Tensor, rope: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        return rotary_both(q, k, *rope) if wanted and rope is not None else (q, k)

    def _check(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor] | None, state: Any
    ) -> None:
        config = self.config
        kind = LayerState if config.kept_keys else AttentionState
        if state is not None and not isinstance(state, (kind, EarlierRanks)):
            raise ValueError(
                f"state: got a {type(state).__name__}, wanted a {kind.__name__} or None with "
                f"kept_keys={config.kept_keys}"
            )
        batch, length = x.shape[:2] if x.ndim == 3 else (-1, -1)
        key_shape = (batch, length, config.num_key_heads, config.head_dim)
        wanted = {
            "x": (x, (batch, length, config.hidden_size)),
            "q": (q, (batch, length, config.num_heads, config.head_dim)),
            "k": (k, key_shape),
            "v": (v, key_shape),
        }
        for name, (tensor, shape) in wanted.items():
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}, wanted {shape}")
        if rope is None:
            if config.window_rope or config.linear_rope:
                raise ValueError("rope=(cos, sin) is needed by window_rope=True or linear_rope=True, got None")
        elif rope[0].shape[-2:] != (length, config.head_dim) or rope[1].shape != rope[0].shape:
            raise ValueError(
                f"rope has shapes {tuple(rope[0].shape)} and {tuple(rope[1].shape)}, "
                f"wanted two of [{batch} or 1, {length}, {config.head_dim}]"
            )


def _attention_of(state: State) -> AttentionState:
    return state.attention if isinstance(state, LayerState) else state


def _with_attention(state: State, attention: AttentionState) -> State:
    return state._replace(attention=attention) if isinstance(state, LayerState) else attention
