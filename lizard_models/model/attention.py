"""An attention layer that can be the teacher's, the student's, or both at once.

Shapes: B batch, T new positions, Hq query heads, Hk key heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lizard_layers import AttentionConfig, EarlierRanks, HybridAttention
from lizard_models.model.cache_name import CACHE, either_name
from lizard_models.model.context import softmax_over_ranks
from lizard_models.model.forward_plan import ForwardPlan
from lizard_models.model.hooks import linear
from lizard_models.model.joined import products
from lizard_models.model.layer_configs import attention_config, lizard_config, sliding_windows
from lizard_models.model.layer_loss import layer_loss
from lizard_models.model.norms import running_norms
from lizard_ops import apply_rotary

AttentionMode = Literal["student", "teacher", "distill"]
NO_PLAN = ForwardPlan()


class LizardAttention(nn.Module):
    """Mixed into a family's attention: the same projections under the same names, and ``lizard`` between them.

    mode "student": the hybrid attention. "teacher": the family's own softmax attention. "distill": both; the loss of
    the student is left in ``last_loss`` and the output chosen by ``stage1.inputs`` (the teacher's) is passed on.
    """

    config: PreTrainedConfig
    layer_idx: int
    head_dim: int
    scaling: float
    is_causal: bool
    softcap: float | None = None  # bound of the scores
    joins = ("q_proj", "k_proj", "v_proj")
    norms_heads = False  # whether ``heads`` norms queries and keys after their projections
    use_rope: bool | int = True  # a family with layers without positions sets it per layer
    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    eager_attention_forward: Callable

    def __init__(self, config: PreTrainedConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        if not self.is_causal:
            raise ValueError(f"layer {layer_idx} attends in both directions: only causal attention can be converted")
        self.lizard = HybridAttention(self.hybrid_config())
        self.teacher_window = sliding_windows(config)[layer_idx]
        self.stage1 = lizard_config(config).stage1
        self.mode: AttentionMode = "student"
        self.last_loss: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without the loss of the last forward, which hangs in a graph."""
        return self.__dict__ | {"last_loss": None}

    def hybrid_config(self) -> AttentionConfig:
        """Shape and choices of the layer's hybrid attention, as the model's config has them."""
        return attention_config(
            self.config, self.layer_idx, scale=self.scaling, softcap=self.softcap, rope=bool(self.use_rope)
        )

    @either_name
    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        plan: ForwardPlan = NO_PLAN,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, hidden] -> the same, and None where transformers has attention weights."""
        if plan.without_mask:
            attention_mask = None
        x, rope = hidden_states, position_embeddings if self.use_rope else None
        if self.mode == "teacher":
            if plan.without_mask:  # in training: the same heads with fewer kernels
                o = self.teacher_attention(*self.heads(x), rope, context_group=plan.context_group, **kwargs)
                return self.o_proj(o.flatten(2)), None
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                **{CACHE: past_key_values} | kwargs,
            )
        q, k, v = self.heads(x)
        if self.mode == "distill":
            return self._distill(x, q, k, v, rope, attention_mask, plan, **kwargs), None
        return self._project(self._student(x, q, k, v, rope, past_key_values, plan)), None

    def _project(self, o: Tensor) -> Tensor:
        """o [B, T, Hq, D] -> [B, T, hidden]."""
        o = o.flatten(2)
        return self.o_proj(o) if running_norms(o) is None else linear(self._modules["o_proj"], o)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, hidden] -> q [B, T, Hq, D], k and v [B, T, Hk, D] as the family has them before RoPE."""
        q, k, v = (torch.unflatten(part, -1, (-1, self.head_dim)) for part in products(self, x))
        return q, k, v

    def _student(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        plan: ForwardPlan,
    ) -> Tensor:
        packing, blocks = plan.packing, self._anchor_blocks(plan)
        if packing is not None:
            turns = rope and tuple(packing.pack(t.expand(x.shape[0], -1, -1)) for t in rope)
            packed = (packing.pack(t) for t in (x, q, k, v))
            o = self.lizard(*packed, turns, cu_seqlens=packing.cu_seqlens, anchor_blocks=blocks)[0]
            return packing.unpack(o, q)
        if cache is None:
            begin = None if plan.context_group is None else EarlierRanks(plan.context_group)
            return self.lizard(x, q, k, v, rope, begin, padding_mask=plan.padding_mask, anchor_blocks=blocks)[0]
        layer: Any = cache.layers[self.layer_idx]
        return layer.read(self.lizard, x, q, k, v, rope, plan.padding_mask, blocks)

    def _anchor_blocks(self, plan: ForwardPlan) -> Any:
        """The layer's own, of those by layer type."""
        blocks = plan.anchor_blocks if self.use_rope else None
        if blocks is None:
            return None
        return blocks[None if None in blocks else self.config.layer_types[self.layer_idx]]

    def _distill(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        plan: ForwardPlan,
        **kwargs: Any,
    ) -> Tensor:
        heads = self.teacher_attention(q, k, v, rope, attention_mask, plan.context_group, **kwargs)
        parameters = [p for p in self.lizard.parameters() if p.requires_grad] if plan.with_gradients else []
        behind = self.stage1.target == "output"
        target = self._project(heads) if behind else heads  # once: it is also what the layer passes on
        with torch.set_grad_enabled(plan.with_gradients):
            self.last_loss, student = layer_loss(
                lambda: self._student(x, q, k, v, rope, None, plan),
                target,
                self.stage1.error,
                plan.padding_mask,
                parameters,
                self._project if behind else None,
                plan.context_group,
            )
        chosen = target if self.stage1.inputs == "teacher" else student
        return chosen if behind else self._project(chosen)

    def teacher_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None = None,
        context_group: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """The family's causal softmax attention of the same heads, without the output projection.

        q [B, T, Hq, D], k and v [B, T, Hk, D] as ``heads`` gives them; rope None where the layer has none;
        attention_mask as transformers prepares it for the
        attention implementation in use; context_group: over whose ranks the text lies -> o [B, T, Hq, D].
        """
        name = self.config._attn_implementation
        attend: Callable = self.eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        q, k = (q, k) if rope is None else (apply_rotary(q, *rope), apply_rotary(k, *rope))
        if context_group is not None:
            return softmax_over_ranks(q, k, v, self.scaling, context_group)
        heads = [t.transpose(1, 2) for t in (q, k, v)]
        o, _ = attend(
            self,
            *heads,
            attention_mask,
            scaling=self.scaling,
            sliding_window=self.teacher_window,
            **({} if self.softcap is None else {"softcap": self.softcap}),
            **kwargs,
        )
        return o
