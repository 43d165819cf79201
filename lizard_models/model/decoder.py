"""What turns a family's decoder into a Lizard's: converted layers, a constant-size cache, masks, packed rows.

Shapes: B batch, T new positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import logging

from lizard_models.model.attention import LizardAttention
from lizard_models.model.cache import LizardCache
from lizard_models.model.cache_name import CACHE, either_name
from lizard_models.model.checkpointing import checkpointed_layers, without_checkpointing
from lizard_models.model.context import check_part, part_positions
from lizard_models.model.forward_plan import ForwardPlan
from lizard_models.model.fused_mlp import with_product
from lizard_models.model.graphs import is_accompanied, is_exporting, is_graphed, may_leave_graph
from lizard_models.model.joined import join_projections
from lizard_models.model.layer_configs import converted_layers, kept_layers, sliding_windows
from lizard_models.model.modes import LizardModelMixin
from lizard_models.model.norms import fused_norms, with_kernel, with_sums
from lizard_models.model.packing import (
    Packing,
    assert_one_text,
    find_packing,
    find_packing_outside,
    packed_mask,
    positions_of_documents,
    trace_one_text,
)
from lizard_models.model.padding import (
    all_real,
    check_padding_mask,
    new_columns,
    placeholder_mask,
    refuse_gaps,
    repeat_over_padding,
)
from lizard_models.model.positions import (
    MovedAnchors,
    anchor_blocks,
    assert_anchors_stay,
    moves_anchors,
    packed_anchor_blocks,
    position_range,
    with_far_positions,
)
from lizard_models.model.token_step import TokenSteps

logger = logging.get_logger(__name__)


def make_ready(cache: LizardCache | None, batch: int) -> None:
    """``LizardCache.make_ready``, once nothing is left to refuse. A graph finds its cache ready."""
    if cache is not None and not torch.compiler.is_compiling():
        cache.make_ready(batch)


class LizardDecoder(LizardModelMixin):
    """Mixed into a family's decoder: converted attention layers, a constant-size cache, 2-D padding masks."""

    attention_class: type[LizardAttention]
    rotary_emb: Any
    head_keys = ("lm_head.weight",)

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.mode = "student"
        layers: Any = self.layers
        converted = converted_layers(config)
        self.has_softmax_layers = len(converted) < len(layers)
        windows = sliding_windows(config)
        self.keeps_sliding_layers = any(windows[i] is not None for i in kept_layers(config))
        for i in converted:
            layers[i].self_attn = self.attention_class(config, i)
        self.position_range, self.moves_anchors = position_range(config), moves_anchors(config)
        self.rotary_emb = with_far_positions(self.rotary_emb)
        for i, layer in enumerate(layers):
            layers[i] = with_sums(layer)
        for name, module in list(self.named_modules()):
            if (twin := with_kernel(with_product(module))) is not module:
                self.set_submodule(name, twin)
        self.post_init()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LizardDecoder:
        exact = dict(self.rotary_emb.named_buffers())
        super()._apply(fn, recurse)
        for name, frequencies in self.rotary_emb.named_buffers():
            if frequencies.dtype in (torch.float16, torch.bfloat16):  # angles of far positions need every bit
                setattr(self.rotary_emb, name, exact[name].to(frequencies.device))
        join_projections(self.layers)  # type: ignore[arg-type]
        return self

    @property
    def causal_without_mask(self) -> bool:
        """Whether full rows need no mask in the teacher's attention: SDPA is causal by itself.

        Transformers finds that out too, by reading the position ids back from the device in every forward.
        """
        sliding = getattr(self.config, "sliding_window", None) is not None
        return self.config._attn_implementation == "sdpa" and not sliding and not self.has_softmax_layers

    def new_cache(self, *, static: bool = False, max_cache_len: int | None = None) -> Cache:
        """An empty cache for the current mode: constant size for the student, keys and values for the teacher.

        static, max_cache_len: for compiled decoding, as ``LizardCache`` takes them.
        """
        if self.mode == "teacher" and static:
            if max_cache_len is None:
                raise ValueError("max_cache_len: got None, wanted the number of positions a static cache holds")
            return StaticCache(config=self.config, max_cache_len=max_cache_len)
        if self.mode == "teacher":
            return DynamicCache(config=self.config)
        return LizardCache(self.config, static=static, max_cache_len=max_cache_len)

    @either_name
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """As the family's decoder, with these differences.

        attention_mask [B, past + T], nonzero at real tokens, wherever the padding stands; positions that are not given
        count real tokens only. With a static cache it may have all ``max_cache_len`` columns, of which those after
        past + T are not read, so that steps in a graph have one shape. Padding after a real token repeats that token's
        output. Position ids of real tokens that do not rise by one (or ``cu_seq_lens_q`` or ``seq_idx`` without
        position ids) mark packed sequences, which do not see each other and leave no cache. torch.compile leaves its
        graph to look for them; in one graph (fullgraph=True, torch.export, a CUDA graph, or with a cache) they fail an
        assertion when it runs, as do positions past the limit in an export of a model whose anchors move. A cache must
        be a ``LizardCache``; unless asked for, none is made in training. A mask must say of cached positions what the
        cache has read of them; a graph does not check that. context_group=: a process group or a mesh over whose ranks
        every row lies in parts, of which these positions are this rank's (``context_part``, docs/parallel.md).

        Raises ValueError for what does not fit, and says what would.
        """
        within = kwargs.pop("within_causal_lm", False)  # which reads the fields, whatever config.return_dict says
        with without_checkpointing(self):
            outputs = self._read(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, **kwargs
            )
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return outputs if wants_dict or within else outputs.to_tuple()

    def _read(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        past_key_values: Cache | None,
        inputs_embeds: Tensor | None,
        use_cache: bool | None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        self.rotary_emb.reach(None if self.mode == "teacher" else self.position_range)
        tokens = input_ids if input_ids is not None else inputs_embeds
        context_group = kwargs.pop("context_group", None)
        if context_group is not None:
            check_part(self, tokens, attention_mask, past_key_values, use_cache, context_group)
            use_cache = False
        if position_ids is None and tokens is not None:
            position_ids = positions_of_documents(kwargs, tokens.shape[1])
        plain = position_ids is None and attention_mask is None and past_key_values is None
        if self.mode == "teacher":
            if isinstance(past_key_values, LizardCache):
                raise ValueError('mode "teacher" cannot fill a LizardCache: use model.new_cache()')
            if plain and use_cache is False and self.causal_without_mask and input_ids is not None:
                attention_mask, kwargs["plan"] = placeholder_mask(input_ids), ForwardPlan(without_mask=True)
            if context_group is not None and tokens is not None:
                position_ids = part_positions(tokens, None, context_group) if position_ids is None else position_ids
                kwargs["plan"] = ForwardPlan(without_mask=True, context_group=context_group)
                attention_mask = placeholder_mask(tokens)
            return super().forward(
                input_ids,
                attention_mask,
                position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                return_dict=True,
                **{CACHE: past_key_values} | kwargs,
            )
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("cache") is not None:
            raise ValueError(
                f"cache: got a {type(kwargs['cache']).__name__}, wanted past_key_values=model.new_cache(): the layers "
                "of a Lizard model keep a state and no paged keys and values, so there is no continuous batching: use "
                "generate with a padded batch"
            )
        if str(self.config._attn_implementation).startswith("paged|"):
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r}: the layers of a Lizard model keep no paged "
                'keys and values; wanted "sdpa", "eager" or another without pages'
            )
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError(
                "output_attentions=True: the layers of a Lizard model have no attention matrices to return"
            )
        batch, length = tokens.shape[:2]
        if length == 0 and self.has_softmax_layers:
            name = "input_ids" if input_ids is not None else "inputs_embeds"
            raise ValueError(f"{name}: got 0 tokens, wanted at least 1: kept softmax layers cannot read none")
        first = None
        if isinstance(past_key_values, LizardCache) and attention_mask is not None:
            attention_mask, first = past_key_values.place_in_mask(attention_mask, length)
        real = None
        if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] >= length:
            real = new_columns(attention_mask, length, first).bool()
        if context_group is not None and position_ids is None:
            position_ids = part_positions(tokens, real, context_group)
        past_key_values, packing = self._cache_and_packing(
            past_key_values, use_cache, position_ids, real, batch, length
        )
        if context_group is not None and packing is not None:
            raise ValueError("context_group: packed sequences lie in no parts: one text a row, or leave it out")
        if position_ids is not None and length > 1 and not is_graphed(position_ids) and torch.jit.is_tracing():
            position_ids = trace_one_text(packing, position_ids, real)
        past = 0 if past_key_values is None else past_key_values.known_length()
        padding_mask = check_padding_mask(attention_mask, batch, past, length)
        if padding_mask is not None:
            if self.keeps_sliding_layers:
                refuse_gaps(padding_mask)
            new = padding_mask.shape[1] - length
            if new and past_key_values is not None and not is_graphed(padding_mask):
                past_key_values.check_mask(padding_mask[:, :new])
            make_ready(past_key_values, batch)
            whole_mask = padding_mask
            if position_ids is None:
                position_ids = new_columns((padding_mask.long().cumsum(-1) - 1).clamp(min=0), length, first)
            padding_mask = new_columns(padding_mask, length, first)
        elif past_key_values is not None:
            if self.has_softmax_layers and past_key_values.padded and not is_graphed(tokens):
                past_key_values.check_mask(None)
            make_ready(past_key_values, batch)
            start = past_key_values.positions() if position_ids is None else None
            if start is not None:
                position_ids = start[:, None] + torch.arange(length, device=start.device)
        if all_real(padding_mask):
            padding_mask = None
        if context_group is not None and position_ids is not None and self.moves_anchors:
            past = int(position_ids.max()) + 1 - length
        padded = past_key_values is None or past_key_values.padded
        blocks = self._anchor_blocks(tokens, position_ids, past, packing, padded)
        plan = ForwardPlan(padding_mask, packing, blocks, context_group=context_group)
        if self.mode == "student" and not self.has_softmax_layers:
            attention_mask = placeholder_mask(tokens)
        elif packing is not None and attention_mask is not None:
            # transformers looks for packed sequences only where there is no mask.
            attention_mask = None
            if padding_mask is not None:
                attention_mask = packed_mask(packing, padding_mask, self.dtype, self.config)
        if self.mode == "distill":
            self._refuse_rescaled(position_ids, length)
            if (plain or context_group is not None) and self.causal_without_mask:
                attention_mask, plan = placeholder_mask(tokens), plan._replace(without_mask=True)
            plan = plan._replace(with_gradients=torch.is_grad_enabled())
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode != "distill"):
            outputs = self._family_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                inputs_embeds=inputs_embeds,
                use_cache=past_key_values is not None,
                plan=plan,
                return_dict=True,
                **{CACHE: past_key_values},
                **kwargs,
            )
        if past_key_values is not None:
            past_key_values.advance(length)
            if padding_mask is not None and not is_graphed(padding_mask):
                past_key_values.padded, past_key_values.read_mask = True, whole_mask
        if padding_mask is not None and length > 1:
            outputs.last_hidden_state = repeat_over_padding(outputs.last_hidden_state, padding_mask)
        return outputs

    def _family_forward(self, **inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return super().forward(**inputs)
        if self.training and torch.is_grad_enabled() and checkpointed_layers(self):
            return super().forward(**inputs)  # layers are run again in the backward, each by itself both times
        this: Any = self
        tokens = inputs["input_ids"] if inputs["inputs_embeds"] is None else inputs["inputs_embeds"]
        one = self.mode == "student" and tokens.device.type == "cpu" and tokens.shape[:2] == (1, 1)
        with fused_norms(this.layers, this.norm, TokenSteps() if one else None):
            return super().forward(**inputs)

    def _refuse_rescaled(self, position_ids: Tensor | None, length: int) -> None:
        """Raises ValueError where the teacher would rescale its frequencies and the student keeps them."""
        context = self.rotary_emb.rescales_past()
        if context is None:
            return
        context = max(context, self.position_range.limit)  # up to the limit a student's are the family's
        reached = length if position_ids is None else int(position_ids.max()) + 1
        if reached > context:
            raise ValueError(
                f"input_ids: got {reached} positions, wanted at most {context} in mode "
                '"distill": past them dynamic RoPE rescales the frequencies of the teacher, and a student keeps its '
                "own, so there is nothing to compare"
            )

    def _cache_and_packing(
        self,
        cache: Cache | None,
        use_cache: bool | None,
        position_ids: Tensor | None,
        real: Tensor | None,
        batch: int,
        length: int,
    ) -> tuple[LizardCache | None, Packing | None]:
        packing = None
        if position_ids is not None and length > 1 and (torch.compiler.is_compiling() or not is_accompanied()):
            if not is_graphed(position_ids):
                packing = find_packing(position_ids, batch, real)
            elif cache is None and not use_cache and may_leave_graph():
                packing = find_packing_outside(position_ids, batch, real)
            else:
                assert_one_text(position_ids, real)
        cache = self._cache_for(cache, use_cache, packing is not None)
        if cache is not None and not torch.compiler.is_compiling():
            cache.expect(batch, length)
        return cache, packing

    def _anchor_blocks(
        self, tokens: Tensor, position_ids: Tensor | None, past: int | None, packing: Packing | None, padded: bool
    ) -> MovedAnchors | None:
        """Where the anchors move on among the new positions; None if no row can reach the limit. padded: whether
        padding may have been read, so that a row may have fewer tokens before than ``past``."""
        length = tokens.shape[1]
        step = length == 1 and torch.compiler.is_compiling()  # one graph of a step must do before and past the limit
        if not self.moves_anchors or not length:
            return None
        exported = is_exporting() and not step  # of an open length: the program cannot depend on where it ends
        if not exported and past is not None and past + length <= self.position_range.limit and not step:
            return None
        if position_ids is None:
            position_ids = torch.arange(past or 0, (past or 0) + length, device=tokens.device)[None]
        if exported:
            assert_anchors_stay(position_ids, self.position_range)
            return None
        if packing is not None:
            starts, lengths = packing.spans(position_ids.expand(tokens.shape[0], -1))
            return packed_anchor_blocks(self.rotary_emb, starts, lengths, self.position_range, position_ids.device)
        before = 0 if past is None or padded or torch.compiler.is_compiling() else past
        filled = before >= self.position_range.limit  # which is no less than window and anchors
        return anchor_blocks(self.rotary_emb, position_ids, self.position_range, length == 1, filled)

    def _cache_for(self, cache: Cache | None, use_cache: bool | None, packed: bool) -> LizardCache | None:
        if self.mode == "distill" or packed:
            if cache is not None or use_cache:
                without = 'mode "distill"' if self.mode == "distill" else "a batch of packed sequences"
                raise ValueError(f"{without} keeps no cache: leave past_key_values and use_cache out")
            return None
        if self.training and torch.is_grad_enabled() and checkpointed_layers(self):
            if cache is not None:
                raise ValueError(
                    "past_key_values: layers under gradient checkpointing read no cache in training: leave it out, or "
                    "call model.eval(), model.gradient_checkpointing_disable() or torch.no_grad() first"
                )
            if use_cache:
                logger.warning_once("use_cache=True: gradient checkpointing keeps no cache in training, there is none")
            return None
        if cache is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            return LizardCache(self.config) if use_cache else None
        if not isinstance(cache, LizardCache):
            raise ValueError(
                f"past_key_values must be a LizardCache, got {type(cache).__name__}: use model.new_cache()"
            )
        return cache
