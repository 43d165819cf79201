"""A converted layer in vLLM: the projections that its family has there, and our attention over pages between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import CompilationConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from lizard_layers import HybridAttention, State, page_layout, state_of
from lizard_models.model.positions import MovedAnchors, anchor_blocks, packed_anchor_blocks
from lizard_ops import apply_rotary
from lizard_vllm import BACKEND
from lizard_vllm.backend import LizardMetadata
from lizard_vllm.checks import check_blocks
from lizard_vllm.names import OP, TURN_OP
from lizard_vllm.pages import NOWHERE, Moves, read_batch


class Turns:
    """cos and sin of a batch's positions, as the model's own rotary embedding has them. One for all layers."""

    def __init__(self, rotary: Any, limits: Any) -> None:
        self.rotary, self.limits = rotary, limits
        self.by_kind = len(rotary.kinds()) > 1

    def of(self, positions: Tensor, like: Tensor, kind: str | None) -> tuple[Tensor, Tensor]:
        """[T, D] each, in the dtype of ``like``. kind: the layer type, where families have frequencies for each."""
        self._move(like.device)
        cos, sin = self.rotary(like, positions[None], *([kind] if self.by_kind else []))
        return cos[0], sin[0]

    def of_decodes(self, positions: Tensor) -> MovedAnchors:
        """How far the anchors have moved on at positions [B, 1], by layer type."""
        self._move(positions.device)
        return anchor_blocks(self.rotary, positions, self.limits, True)

    def of_prefills(self, starts: list[int], lengths: list[int], device: torch.device) -> MovedAnchors | None:
        """The same of packed sequences; None: nowhere."""
        self._move(device)
        return packed_anchor_blocks(self.rotary, starts, lengths, self.limits, device)

    def _move(self, device: torch.device) -> None:
        if next(self.rotary.buffers()).device != device:
            self.rotary.to(device)


class LizardLayer(nn.Module, MambaBase):
    """Takes the place of a family's attention: its projections and head norms, and ``lizard`` where softmax was."""

    qkv_proj: Any
    o_proj: Any
    q_norm: Any
    k_norm: Any

    def __init__(self, inner: Any, attention: HybridAttention, turns: Turns, vllm_config: Any, name: str) -> None:
        """inner: the family's attention in vLLM, whose parts are taken over. name: its place in the model."""
        super().__init__()
        self.qkv_proj, self.o_proj = inner.qkv_proj, inner.o_proj
        self.q_norm, self.k_norm = getattr(inner, "q_norm", None), getattr(inner, "k_norm", None)
        self.q_size, self.kv_size = inner.q_size, inner.kv_size
        self.lizard, self.name = attention, name
        self.turns, self.use_rope, self.layer_type = turns, True, None  # set by ``convert``
        self.layout = page_layout(attention.config, vllm_config.model_config.dtype)
        self.page_bytes = self.layout.nbytes
        self.kv_cache = (torch.empty(0),)
        self._pool: State | None = None
        contexts = vllm_config.compilation_config.static_forward_context
        contexts.pop(f"{name}.attn")  # that of the softmax attention which is not there any more
        contexts[name] = self

    def forward(self, positions: Tensor, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """positions [T], hidden_states [T, hidden] -> the same."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        dim = self.lizard.config.head_dim
        q, k, v = (t.unflatten(-1, (-1, dim)) for t in (q, k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        getattr(torch.ops.vllm, OP)(hidden_states, q, k, v, positions, out, self.name)
        output, _ = self.o_proj(out.flatten(1))
        return output

    def attend(self, heads: tuple[Tensor, Tensor, Tensor, Tensor], positions: Tensor, out: Tensor) -> None:
        """Fill ``out`` [T, Hq, D]. Without a batch, when vLLM measures memory, all tokens are one text."""
        metadata = get_forward_context().attn_metadata
        mine: LizardMetadata | None = None if metadata is None else metadata[self.name]
        capturing = positions.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        # what was made before a capture does not follow its positions and pages
        made: dict[Any, Any] = {} if mine is None or capturing else mine.made
        rope = self._rope(positions, heads[0], made)
        if mine is None:
            row = [t[None] for t in heads]
            turned = None if rope is None else (rope[0][None], rope[1][None])
            out.copy_(self.lizard(*row, turned)[0][0])
            return
        if self._pool is None:
            self._pool = state_of(self.layout.views(self.kv_cache[0]))

        moves = self._moves(positions.device, made) if self.use_rope else NOWHERE
        out.copy_(read_batch(self.lizard, self._pool, heads, rope, positions, mine.steps(made), moves))

    def _moves(self, device: torch.device, made: dict[Any, Any]) -> Moves:
        """What is asked of the anchors' places, once in ``made`` for all layers."""
        kind = self.layer_type if self.turns.by_kind else None

        def once(name: str, find: Callable[[], MovedAnchors | None]) -> Any:
            if name not in made:
                made[name] = find()
            return None if made[name] is None else made[name][kind]

        return Moves(
            lambda positions: once("decodes", lambda: self.turns.of_decodes(positions)),
            lambda starts, lengths: once("prefills", lambda: self.turns.of_prefills(starts, lengths, device)),
        )

    def _rope(self, positions: Tensor, like: Tensor, made: dict[Any, Any]) -> tuple[Tensor, Tensor] | None:
        if not self.use_rope:
            return None
        if self.layer_type not in made:
            made[self.layer_type] = self.turns.of(positions, like, self.layer_type)
        return made[self.layer_type]

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        super().bind_kv_cache(kv_cache)
        self._pool = None

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        check_blocks(vllm_config)  # vLLM has chosen its sizes by now
        return super().get_kv_cache_spec(vllm_config)

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((self.page_bytes,),)

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        return (torch.uint8,)

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return getattr(MambaAttentionBackendEnum, BACKEND)


class OwnTurns(nn.Module):
    """In place of vLLM's rotary embedding in a kept softmax layer: the model's own, at any position, or none."""

    def __init__(
        self, turns: Turns, kind: str | None, head_dim: int, use_rope: bool, vllm_config: Any, name: str
    ) -> None:
        super().__init__()
        self.turns, self.kind, self.head_dim, self.use_rope, self.name = turns, kind, head_dim, use_rope, name
        vllm_config.compilation_config.static_forward_context[name] = self  # where the operator finds it

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """positions [T], q and k [T, heads * D] -> the same, turned."""
        if not self.use_rope:
            return q, k
        turned_q, turned_k = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))
        getattr(torch.ops.vllm, TURN_OP)(q, k, positions, turned_q, turned_k, self.name)
        return turned_q, turned_k

    def turn(self, t: Tensor, positions: Tensor, out: Tensor) -> None:
        """Fill ``out`` [T, heads * D] with t, turned."""
        cos, sin = (angle[None] for angle in self.turns.of(positions, t, self.kind))
        out.copy_(apply_rotary(t.unflatten(-1, (-1, self.head_dim))[None], cos, sin)[0].flatten(1))


@eager_break_during_capture  # where vLLM captures mixed batches without torch.compile, which cuts graphs otherwise
def _attend(
    x: torch.Tensor,  # torch's names: annotations are read where vLLM's wrapper is
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor,
    layer_name: str,
) -> None:
    get_forward_context().no_compile_layers[layer_name].attend((x, q, k, v), positions, out)


def _turn(q: Tensor, k: Tensor, positions: Tensor, out_q: Tensor, out_k: Tensor, layer_name: str) -> None:
    own = get_forward_context().no_compile_layers[layer_name]
    own.turn(q, positions, out_q)
    own.turn(k, positions, out_k)


def _no_attend(x: Tensor, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, out: Tensor, layer_name: str) -> None:
    return None


def _no_turn(q: Tensor, k: Tensor, positions: Tensor, out_q: Tensor, out_k: Tensor, layer_name: str) -> None:
    return None


direct_register_custom_op(op_name=OP, op_func=_attend, mutates_args=["out"], fake_impl=_no_attend)
direct_register_custom_op(op_name=TURN_OP, op_func=_turn, mutates_args=["out_q", "out_k"], fake_impl=_no_turn)
if f"vllm::{OP}" not in CompilationConfig._attention_ops:
    CompilationConfig._attention_ops.append(f"vllm::{OP}")  # graphs are cut there, as at every attention
