"""What turns a transformers decoder into a Lizard model, whatever its family.

Shapes: B batch, T new positions, Hq query heads, Hk key heads, D head dim, L converted layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, StaticCache
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lizard_layers import (
    AnchorBlock,
    AttentionConfig,
    Float32Module,
    HybridAttention,
    apply_rope,
    attention_divergence,
    check_readable,
)
from lizard_models.model.cache import LizardCache, is_graphed
from lizard_models.model.layer_configs import (
    attention_config,
    converted_layers,
    has_context,
    kept_layers,
    lizard_config,
    sliding_windows,
)
from lizard_models.model.layer_loss import approximation_error
from lizard_models.model.packing import Packing, find_packing, packed_mask, positions_of_documents
from lizard_models.model.positions import anchor_blocks, moves_anchors, position_range, with_far_positions
from lizard_models.model.safe_loading import SafeLoading
from lizard_models.recipes import Stage1Config

AttentionMode = Literal["student", "teacher", "distill"]


class LizardAttention(nn.Module):
    """Mixed into a family's attention: the same projections under the same names, and ``lizard`` between them.

    mode "student": the hybrid attention. "teacher": the family's own softmax attention. "distill": both; the error of
    the student is left in ``last_error`` and the output chosen by ``stage1.inputs`` (the teacher's) is passed on.
    """

    config: PreTrainedConfig
    layer_idx: int
    head_dim: int
    scaling: float
    is_causal: bool
    softcap: float | None = None  # bound of the scores
    use_rope: bool | int = True  # a family with layers without positions sets it a layer
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
        self.last_error: Tensor | None = None

    def hybrid_config(self) -> AttentionConfig:
        """Shape and choices of the layer's hybrid attention, as the model's config has them."""
        return attention_config(
            self.config, self.layer_idx, scale=self.scaling, softcap=self.softcap, rope=bool(self.use_rope)
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        padding_mask: Tensor | None = None,
        packing: Packing | None = None,
        with_gradients: bool = False,
        anchor_blocks: dict[str | None, list[AnchorBlock]] | None = None,
        without_mask: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states [B, T, hidden] -> the same, and None where transformers has attention weights.

        without_mask: attention_mask is a placeholder and the teacher's attention is plainly causal.
        """
        if without_mask:
            attention_mask = None
        x, rope = hidden_states, position_embeddings if self.use_rope else None
        if self.mode == "teacher":
            if without_mask:  # in training: the same heads with fewer kernels
                o = self.teacher_attention(*self.heads(x), rope, **kwargs)
                return self.o_proj(o.flatten(2)), None
            return super().forward(
                hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                **kwargs,
            )
        q, k, v = self.heads(x)
        blocks = None
        if anchor_blocks is not None and self.use_rope:
            blocks = anchor_blocks[None if None in anchor_blocks else self.config.layer_types[self.layer_idx]]
        if self.mode == "distill":
            o = self._distill(x, q, k, v, rope, attention_mask, padding_mask, packing, blocks, with_gradients, **kwargs)
        else:
            o = self._student(x, q, k, v, rope, past_key_values, padding_mask, packing, blocks)
        return self.o_proj(o.flatten(2)), None

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, hidden] -> q [B, T, Hq, D], k and v [B, T, Hk, D] as the family has them before RoPE."""
        q, k, v = (p(x).unflatten(-1, (-1, self.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        return q, k, v

    def _student(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        padding_mask: Tensor | None,
        packing: Packing | None,
        blocks: list[AnchorBlock] | None,
    ) -> Tensor:
        if packing is not None:
            turns = rope and tuple(packing.pack(t.expand(x.shape[0], -1, -1)) for t in rope)
            packed = (packing.pack(t) for t in (x, q, k, v))
            return packing.unpack(self.lizard(*packed, turns, cu_seqlens=packing.cu_seqlens)[0], q)
        if cache is None:
            return self.lizard(x, q, k, v, rope, padding_mask=padding_mask, anchor_blocks=blocks)[0]
        layer: Any = cache.layers[self.layer_idx]
        return layer.read(self.lizard, x, q, k, v, rope, padding_mask, blocks)

    def _distill(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None,
        padding_mask: Tensor | None,
        packing: Packing | None,
        blocks: list[AnchorBlock] | None,
        with_gradients: bool,
        **kwargs: Any,
    ) -> Tensor:
        target = self.teacher_attention(q, k, v, rope, attention_mask, **kwargs)
        weight, added = self.stage1.attention_weight, None
        if weight:
            if packing is not None:
                raise ValueError("attention_weight: got packed sequences, wanted rows of one text each, or weight 0")

            def added() -> Tensor:
                divergence = attention_divergence(
                    self.lizard,
                    x,
                    q,
                    k,
                    rope,
                    rows=self.stage1.attention_rows,
                    sliding_window=self.teacher_window,
                    padding_mask=padding_mask,
                )
                return weight * divergence.mean()

        parameters = [p for p in self.lizard.parameters() if p.requires_grad] if with_gradients else []
        with torch.set_grad_enabled(with_gradients):
            self.last_error, student = approximation_error(
                lambda: self._student(x, q, k, v, rope, None, padding_mask, packing, blocks),
                target,
                self.stage1.error,
                padding_mask,
                parameters,
                self.o_proj if self.stage1.target == "output" else None,
                added,
            )
        return target if self.stage1.inputs == "teacher" else student

    def teacher_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rope: tuple[Tensor, Tensor] | None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The family's causal softmax attention of the same heads, without the output projection.

        q [B, T, Hq, D], k and v [B, T, Hk, D] as ``heads`` gives them; rope None where the layer has none;
        attention_mask as transformers prepares it for the
        attention implementation in use -> o [B, T, Hq, D].
        """
        name = self.config._attn_implementation
        attend: Callable = self.eager_attention_forward if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        q, k = (q, k) if rope is None else (apply_rope(q, *rope), apply_rope(k, *rope))
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


class LizardModelMixin(SafeLoading):
    """What the decoder and the causal language model share: modes, errors, new parameters, their starts."""

    mode: AttentionMode

    def lizard_attentions(self) -> list[LizardAttention]:
        """The converted attention layers, first to last."""
        layers: Any = self._decoder().layers
        return [layer.self_attn for layer in layers if isinstance(layer.self_attn, LizardAttention)]

    def _decoder(self) -> Any:
        return getattr(self, "model", self)

    def lizard_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and values of the parameters the teacher does not have. All are float32."""
        return ((n, p) for n, p in self.named_parameters() if ".lizard." in n)

    def set_attention_mode(self, mode: AttentionMode, stage1: Stage1Config | None = None) -> None:
        """Choose what converted layers do: "student", "teacher" (softmax) or "distill" (both, with errors).

        stage1 says which error "distill" computes and on which inputs; None takes the model's own. Errors of earlier
        forwards are dropped. Raises ValueError for another mode, and for errors that the layers' form does not have.
        """
        if mode not in get_args(AttentionMode):
            raise ValueError(f"mode must be one of {', '.join(get_args(AttentionMode))}, got {mode!r}")
        recipe = stage1 or lizard_config(self.config).stage1
        if mode == "distill":
            self.check_stage1(recipe)
        self.mode = self._decoder().mode = mode
        for attention in self.lizard_attentions():  # not modules(), which takes milliseconds in every step of stage 2
            attention.mode, attention.last_error, attention.stage1 = mode, None, recipe

    def check_stage1(self, recipe: Stage1Config) -> None:
        """Raises ValueError where the converted layers' form does not have the errors that a recipe asks for."""
        if recipe.attention_weight:
            for attention in self.lizard_attentions()[:1]:  # all have one form
                try:
                    check_readable(attention.lizard.config)
                except ValueError as error:
                    raise ValueError(f"attention_weight={recipe.attention_weight}: {error}; set it to 0") from None

    def attention_errors(self) -> Tensor:
        """Errors [L] float32 of the last forward in mode "distill", in the order of the converted layers.

        Raises ValueError where there was none.
        """
        attentions = self.lizard_attentions()
        errors = [a.last_error for a in attentions if a.last_error is not None]
        if not errors or len(errors) < len(attentions):
            raise ValueError('no attention errors: call set_attention_mode("distill") and run a forward first')
        return torch.stack(errors)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Float32Module):
            loaded = (getattr(p, "_is_hf_initialized", False) for p in module.parameters(recurse=False))
            if not any(loaded):  # transformers calls this after loading too
                module.reset_parameters()
        else:
            super()._init_weights(module)


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
        self.post_init()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LizardDecoder:
        exact = dict(self.rotary_emb.named_buffers())
        super()._apply(fn, recurse)
        for name, frequencies in self.rotary_emb.named_buffers():
            if frequencies.dtype in (torch.float16, torch.bfloat16):  # angles of far positions need every bit
                setattr(self.rotary_emb, name, exact[name].to(frequencies.device))
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

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """As the family's decoder, with these differences.

        attention_mask [B, past + T], nonzero at real tokens, wherever the padding stands; positions that are not given
        count real tokens only. Padding after a real token repeats that token's output. Position ids of real tokens
        that do not rise by one (or ``cu_seq_lens_q`` or ``seq_idx`` without position ids) mark packed sequences,
        which do not see each other and leave no cache. A cache must be a ``LizardCache``; unless asked for, none is
        made in training.
        """
        reached = None if self.mode == "teacher" else self.position_range
        if self.rotary_emb.range != reached:
            self.rotary_emb.range = reached
        tokens = input_ids if input_ids is not None else inputs_embeds
        if position_ids is None and tokens is not None:
            position_ids = positions_of_documents(kwargs, tokens.shape[1])
        plain = position_ids is None and attention_mask is None and past_key_values is None
        if self.mode == "teacher":
            if isinstance(past_key_values, LizardCache):
                raise ValueError('mode "teacher" cannot fill a LizardCache: use model.new_cache()')
            if plain and use_cache is False and self.causal_without_mask and input_ids is not None:
                attention_mask, kwargs["without_mask"] = placeholder_mask(input_ids), True
            return super().forward(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache=use_cache, **kwargs
            )
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError(
                "output_attentions=True: the layers of a Lizard model have no attention matrices to return"
            )
        batch, length = tokens.shape[:2]
        past_key_values, packing = self._cache_and_packing(
            past_key_values, use_cache, position_ids, attention_mask, batch, length
        )
        past = 0 if past_key_values is None else past_key_values.known_length()
        padding_mask = check_padding_mask(attention_mask, batch, past, length)
        if padding_mask is not None:
            if self.keeps_sliding_layers:
                refuse_gaps(padding_mask)
            new = padding_mask.shape[1] - length
            if position_ids is None:
                position_ids = (padding_mask.long().cumsum(-1) - 1).clamp(min=0)[:, new:]
            padding_mask = padding_mask[:, new:]
        elif position_ids is None and past_key_values is not None:
            start = past_key_values.positions()
            if start is not None:
                position_ids = start[:, None] + torch.arange(length, device=start.device)
        if all_real(padding_mask):
            padding_mask = None
        kwargs["anchor_blocks"] = self._anchor_blocks(tokens, position_ids, past, packing is not None)
        if self.mode == "student" and not self.has_softmax_layers:
            attention_mask = placeholder_mask(tokens)
        elif packing is not None and attention_mask is not None:
            # transformers looks for packed sequences only where there is no mask.
            attention_mask = None
            if padding_mask is not None:
                attention_mask = packed_mask(packing, padding_mask, self.dtype, self.config)
        if self.mode == "distill":
            if plain and self.causal_without_mask:
                attention_mask, kwargs["without_mask"] = placeholder_mask(tokens), True
            kwargs["with_gradients"] = torch.is_grad_enabled()
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.mode != "distill"):
            outputs = super().forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=past_key_values is not None,
                padding_mask=padding_mask,
                packing=packing,
                **kwargs,
            )
        if past_key_values is not None:
            past_key_values.advance(length)
        if padding_mask is not None and length > 1:
            outputs.last_hidden_state = repeat_over_padding(outputs.last_hidden_state, padding_mask)
        return outputs

    def _cache_and_packing(
        self,
        cache: Cache | None,
        use_cache: bool | None,
        position_ids: Tensor | None,
        attention_mask: Tensor | None,
        batch: int,
        length: int,
    ) -> tuple[LizardCache | None, Packing | None]:
        packing = None
        if position_ids is not None and length > 1 and not is_graphed(position_ids):
            real = None
            if attention_mask is not None and attention_mask.ndim == 2 and attention_mask.shape[1] >= length:
                real = attention_mask[:, -length:].bool()
            packing = find_packing(position_ids, batch, real)
        cache = self._cache_for(cache, use_cache, packing is not None)
        if cache is not None and not torch.compiler.is_compiling():
            cache.expect(batch)
        return cache, packing

    def _anchor_blocks(
        self, tokens: Tensor, position_ids: Tensor | None, past: int | None, packed: bool
    ) -> dict[str | None, list[AnchorBlock]] | None:
        """Where the anchors move on among the new positions; None if no row can reach the limit."""
        length = tokens.shape[1]
        step = length == 1 and torch.compiler.is_compiling()  # one graph of a step must do before and past the limit
        if not self.moves_anchors or not length:
            return None
        if past is not None and past + length <= self.position_range.limit and not step:
            return None
        if position_ids is None:
            position_ids = torch.arange(past or 0, (past or 0) + length, device=tokens.device)[None]
        if packed:
            if int(position_ids.max()) >= self.position_range.limit:
                raise ValueError(
                    f"position_ids reach {int(position_ids.max())}: packed sequences must be no longer than "
                    f'position_limit={self.position_range.limit} with positions="clamped"'
                )
            return None
        return anchor_blocks(self.rotary_emb, position_ids, self.position_range, whole=length == 1)

    def _cache_for(self, cache: Cache | None, use_cache: bool | None, packed: bool) -> LizardCache | None:
        if self.mode == "distill" or packed:
            if cache is not None or use_cache:
                without = 'mode "distill"' if self.mode == "distill" else "a batch of packed sequences"
                raise ValueError(f"{without} keeps no cache: leave past_key_values and use_cache out")
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


class LizardCausalLM(LizardModelMixin, GenerationMixin):
    """Mixed into a family's causal language model: generation with a constant-size cache, strict loading."""

    decoder_class: type[LizardDecoder]

    def __init__(self, config: PreTrainedConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.mode = "student"
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_cache(self, *, static: bool = False, max_cache_len: int | None = None) -> Cache:
        """An empty cache for the current mode: constant size for the student, keys and values for the teacher.

        static, max_cache_len: for compiled decoding, as ``LizardCache`` takes them.
        """
        return self.model.new_cache(static=static, max_cache_len=max_cache_len)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the family's model. In mode "distill" the loss is the mean of ``attention_errors()``, without logits."""
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        if self.mode != "distill":
            return super().forward(**inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
        outputs = self.model(**inputs, **kwargs)
        return CausalLMOutputWithPast(loss=self.attention_errors().mean(), hidden_states=outputs.hidden_states)

    def _prepare_cache_for_generation(
        self: Any,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
        *args: Any,
    ) -> Any:
        kind = generation_config.cache_implementation
        if self.mode == "student" and kind not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation={kind!r}: a Lizard model has a constant-size cache of its own; "
                'wanted None, "dynamic", or "static" to compile the decode step'
            )
        makes_cache = model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False
        if self.mode == "student" and makes_cache:
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs["past_key_values"] = self.new_cache(static=kind == "static", max_cache_len=length)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
        else:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
            )

    def _prepare_position_ids_for_generation(self: Any, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        mask = model_kwargs.get("attention_mask")
        if self.mode == "student" and mask is not None:
            return mask.long().cumsum(-1) - 1  # padding repeats its predecessor's, so that the next token's is right
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)  # type: ignore[misc]

    @staticmethod
    def create_masks_for_generate(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """The 2-D mask as it is: the decoder makes what its layers need."""
        return attention_mask

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Any,
        *args: Any,
        inputs_embeds: Any = None,  # generate looks for it by name
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers', without a mask where a step has none to read."""
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        step = inputs.get("input_ids") is not None and inputs["input_ids"].shape[1] == 1 and not is_first_iteration
        if step and inputs.get("past_key_values") is not None and not self.model.has_softmax_layers:
            if self.mode == "student" and inputs.get("position_ids") is not None:
                inputs.pop("attention_mask", None)  # generate appends real tokens only
        return inputs

    def _prefill(
        self: Any, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        if self.mode == "student" and isinstance(cache, LizardCache):
            columns = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
            new, seen = input_ids.shape[1], cache.get_seq_length()
            if seen and columns == new and new <= seen:
                raise ValueError(
                    f"input_ids has {new} tokens, but past_key_values has seen {seen}: give the whole text, or the new "
                    f"tokens alone with an attention_mask of {seen} + {new} columns (cache.inputs_for makes it)"
                )
            chunk = generation_config.prefill_chunk_size
            if chunk is not None and mask is not None and chunk < new and not bool(mask[:, -1].all()):
                raise ValueError(f"prefill_chunk_size={chunk}: rows padded on the right are read in one piece")
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _get_stopping_criteria(self: Any, *args: Any, **kwargs: Any) -> Any:
        criteria = super()._get_stopping_criteria(*args, **kwargs)  # type: ignore[misc]
        if self.mode == "student" and not has_context(self.config):
            for criterion in criteria:  # their warning that the context is exceeded would mislead: there is none
                if isinstance(criterion, MaxLengthCriteria):
                    criterion.max_position_embeddings = None
        return criteria


def placeholder_mask(tokens: Tensor) -> Tensor:
    """A 4-D mask that no layer reads: transformers takes it as it is and builds none of [T, T]."""
    return tokens.new_zeros(1, 1, 1, 1, dtype=torch.bool)


def check_padding_mask(attention_mask: Tensor | None, batch: int, past: int | None, length: int) -> Tensor | None:
    """The mask [B, past + T] as bool, or None. Raises ValueError for another shape; past None is not known."""
    if attention_mask is None:
        return None
    columns = attention_mask.shape[-1] if past is None else past + length
    if attention_mask.shape != (batch, columns) or columns < length:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, wanted [{batch}, {columns}]: "
            f"one column for each of the {columns - length} cached and {length} new positions"
        )
    return attention_mask.bool()


def refuse_gaps(padding_mask: Tensor) -> None:
    """Raises ValueError for padding [B, T] between real tokens. Reads the data, but in a graph.

    A kept sliding-window layer is transformers' own, which counts such padding as positions of its window.
    """
    starts = padding_mask.clone()
    starts[:, 1:] &= ~padding_mask[:, :-1]
    rows = starts.sum(1) > 1
    if not is_graphed(padding_mask) and bool(rows.any()):
        raise ValueError(
            f"attention_mask has padding between the real tokens of row {int(rows.nonzero()[0])}, which the kept "
            "sliding-window layers would count: pad on the left, or convert with keep_sliding_layers=False"
        )


def all_real(padding_mask: Tensor | None) -> bool:
    """Whether no position is padding, so that layers may skip the mask. Reads the data, once a forward."""
    return padding_mask is None or (not torch.compiler.is_compiling() and bool(padding_mask.all()))


def repeat_over_padding(hidden: Tensor, padding_mask: Tensor) -> Tensor:
    """hidden [B, T, ...] with that of the last real token wherever padding [B, T] follows one.

    So the last position of a right-padded row predicts what its last token predicts.
    """
    places = torch.arange(hidden.shape[1], device=hidden.device)
    last = torch.where(padding_mask, places, -1).cummax(1).values
    source = torch.where(last < 0, places, last)
    return hidden.gather(1, source.unsqueeze(-1).expand_as(hidden))
