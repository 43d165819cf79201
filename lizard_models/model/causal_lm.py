"""What turns a family's causal language model into a Lizard: generation with a constant-size cache."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.stopping_criteria import MaxLengthCriteria
from transformers.modeling_outputs import CausalLMOutputWithPast

from lizard_models.model.cache import LizardCache
from lizard_models.model.cache_name import CACHE, either_name, transformers_names
from lizard_models.model.decode_graph import decode_steps, running_steps
from lizard_models.model.decoder import LizardDecoder
from lizard_models.model.layer_configs import has_context
from lizard_models.model.modes import LizardModelMixin
from lizard_models.model.prefix.generation import ReadsFromPrefixes
from lizard_models.model.read_graph import read_from_graph
from lizard_models.model.row_product import RowLinear
from lizard_models.model.tensor_parallel import HEAD_PLAN

NO_PAGES = (
    "{}: a Lizard model has a constant-size cache of its own and no pages: call generate with a padded batch and its "
    'attention_mask; cache_implementation None, "dynamic" or "static"'
)


class LizardCausalLM(LizardModelMixin, ReadsFromPrefixes, GenerationMixin):
    """Mixed into a family's causal language model: generation with a constant-size cache, strict loading."""

    decoder_class: type[LizardDecoder]
    _tp_plan: Any = HEAD_PLAN
    _pp_plan: Any = None  # the family's plan knows nothing of the new parameters

    def __init__(self, config: PreTrainedConfig) -> None:
        PreTrainedModel.__init__(self, config)
        self.mode = "student"
        self.model = self.decoder_class(config)
        self.vocab_size = config.vocab_size
        self.lm_head = RowLinear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def new_cache(self, *, static: bool = False, max_cache_len: int | None = None) -> Cache:
        """An empty cache for the current mode: constant size for the student, keys and values for the teacher.

        static, max_cache_len: for compiled decoding, as ``LizardCache`` takes them.
        """
        return self.model.new_cache(static=static, max_cache_len=max_cache_len)

    @either_name
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
        decode_graph: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """As the family's model. In mode "distill" the loss is the mean of ``layer_losses()``, without logits.

        A Trainer that accumulates hands ``num_items_in_batch`` over, the labels of all forwards of a step; the loss is
        then times the share of them that are in this forward, so that the losses of a step add up to their mean.
        decode_graph False: not from a CUDA graph, where a reading of this shape would be (docs/performance.md).
        Raises ValueError for it without labels, and as the decoder's forward.
        """
        inputs = dict(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
        )
        steps = running_steps(self)
        if steps is not None:
            others = dict(inputs, labels=labels, logits_to_keep=logits_to_keep, **kwargs)
            del others["input_ids"], others["past_key_values"]
            logits = steps.logits(past_key_values, input_ids, others)
            if logits is not None:
                return _read(logits, past_key_values)
        if decode_graph is not False:
            found = read_from_graph(self, inputs | kwargs | {"labels": labels, "logits_to_keep": logits_to_keep})
            if found is not None:
                return _read(*found)
        if kwargs.get("context_group") is not None and labels is not None and kwargs.get("shift_labels") is None:
            raise ValueError(
                "labels: the last position of a part predicts the next part's first: give shift_labels too"
            )
        kwargs["within_causal_lm"] = True
        if self.mode != "distill":
            given = transformers_names(inputs) | kwargs
            return super().forward(**given, labels=labels, logits_to_keep=logits_to_keep)
        return_dict, items = kwargs.pop("return_dict", None), kwargs.pop("num_items_in_batch", None)
        share = 1 if items is None else share_of_items(labels, kwargs.get("shift_labels"), items)
        outputs = self.model(**inputs, **kwargs)
        loss = CausalLMOutputWithPast(loss=self.layer_losses().mean() * share, hidden_states=outputs.hidden_states)
        return loss if (self.config.return_dict if return_dict is None else return_dict) else loss.to_tuple()

    @property
    def init_continuous_batching(self: Any) -> Any:
        """Not there for the student, whose layers keep no paged keys and values.

        An AttributeError that says what there is: transformers' server asks ``hasattr`` whether a model can be batched.
        """
        if self.mode != "teacher":
            raise AttributeError
        return super().init_continuous_batching  # type: ignore[misc]

    def __getattr__(self, name: str) -> Any:
        if name == "init_continuous_batching":  # a property's own message is lost on the way through a Module
            raise AttributeError(NO_PAGES.format("continuous batching (init_continuous_batching)"))
        return super().__getattr__(name)  # type: ignore[misc]

    def continuous_batching_context_manager(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refused for the student, whose layers keep no paged keys and values: a ValueError says what there is."""
        self._refuse_paging("continuous batching (continuous_batching_context_manager)")
        return super().continuous_batching_context_manager(*args, **kwargs)  # type: ignore[misc]

    def generate_batch(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``continuous_batching_context_manager``."""
        self._refuse_paging('continuous batching (generate_batch, cache_implementation="paged")')
        return super().generate_batch(*args, **kwargs)  # type: ignore[misc]

    def _refuse_paging(self, what: str) -> None:
        if self.mode != "teacher":
            raise ValueError(NO_PAGES.format(what))

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
        makes_cache = model_kwargs.get(CACHE) is None and generation_config.use_cache is not False
        if self.mode == "student" and makes_cache:
            length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
            if kind == "static":  # no shorter than before, so that what was compiled for it serves again
                length = self._previous_max_cache_length = max(length, getattr(self, "_previous_max_cache_length", 0))
            model_kwargs[CACHE] = self.new_cache(static=kind == "static", max_cache_len=length)
        else:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args
            )
        cache = model_kwargs.get(CACHE)
        if generation_config.is_assistant and isinstance(cache, LizardCache):
            cache.activate_past_recording(generation_config.max_new_tokens or max_cache_length)  # the draft to come
            mask, read = model_kwargs.get("attention_mask"), cache.mask_of_the_past()
            if mask is not None and read is not None and read.shape[1] < mask.shape[1]:
                # A mask made of the ids takes a padding token that a model wrote for padding.
                new = mask[:, read.shape[1] :]
                model_kwargs["attention_mask"] = torch.cat([read.to(mask.device, mask.dtype), new], 1)

    def _sample(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers', with steps from a CUDA graph where they can be: ``decode_graph=False`` of ``generate``."""
        with self._decode_steps(input_ids, kwargs):
            return super()._sample(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _beam_search(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``_sample``."""
        with self._decode_steps(input_ids, kwargs):
            return super()._beam_search(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _decode_steps(self: Any, input_ids: Tensor, kwargs: dict[str, Any]) -> Any:
        config = kwargs["generation_config"]
        wanted = kwargs.pop("decode_graph", None)
        if wanted is None:
            wanted = getattr(config, "decode_graph", None)
        if wanted not in (None, True, False):
            raise ValueError(f"decode_graph: got {wanted!r}, wanted True, False, or None, which is True on a GPU")
        wanted = wanted is not False and getattr(config, "compile_config", None) is None
        to_come, kept = config.max_length - input_ids.shape[1], bool(config.return_dict_in_generate)
        return decode_steps(self, wanted, input_ids.shape[0], to_come, kwargs, kept)

    def _valid_auto_compile_criteria(self: Any, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
        """As transformers', but for steps that come from a CUDA graph already."""
        if running_steps(self) is not None:
            return False
        return super()._valid_auto_compile_criteria(model_kwargs, generation_config)  # type: ignore[misc]

    def _assisted_decoding(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. Raises ValueError for a cache that has read tokens without the whole text beside it."""
        cache, mask, new = kwargs.get(CACHE), kwargs.get("attention_mask"), input_ids.shape[1]
        if isinstance(cache, LizardCache) and (seen := cache.get_seq_length()):
            columns = getattr(kwargs["generation_config"], "_mask_length", new) if mask is None else mask.shape[1]
            if columns != new or new <= seen:
                raise ValueError(
                    f"input_ids has {new} tokens, and past_key_values has seen {seen}: drafts (prompt lookup, "
                    "assistants) go on from a cache only with the whole text and its attention_mask"
                )
        return super()._assisted_decoding(input_ids, *args, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(
        self: Any,
        generation_config: Any,
        input_ids: Any,
        inputs_tensor: Any,
        logits_processor: Any,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """As transformers', with a cache that can take back the longest draft; what it has read is not read again."""
        drafts = super()._get_candidate_generator(  # type: ignore[misc]
            generation_config, input_ids, inputs_tensor, logits_processor, model_kwargs, *args, **kwargs
        )
        cache, remaining = model_kwargs.get(CACHE), generation_config.max_length - input_ids.shape[1]
        if isinstance(cache, LizardCache):
            model_kwargs["read_before"] = cache.get_seq_length()
            own = getattr(drafts, "assistant_generation_config", None)
            grows = own is not None and str(own.num_assistant_tokens_schedule).startswith("heuristic")
            length = getattr(drafts, "num_assistant_tokens", None) or getattr(drafts, "num_output_tokens", None)
            longest = remaining if grows or length is None else int(length)
            cache.activate_past_recording(longest + 1)  # a draft, and the token before it
        return drafts

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
        read_before: int = 0,
        decode_graph: bool | None = None,  # read before
        **kwargs: Any,
    ) -> dict[str, Any]:
        """As transformers', without a mask where a step has none to read, with one of one shape in a static cache, and
        without what drafts find read already."""
        steps = running_steps(self)
        if steps is not None and not is_first_iteration:
            made = steps.inputs(input_ids, kwargs)
            if made is not None:
                return made
        if read_before and is_first_iteration:
            kwargs["next_sequence_length"] = input_ids.shape[1] - read_before
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, *args, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        step = inputs.get("input_ids") is not None and inputs["input_ids"].shape[1] == 1 and not is_first_iteration
        if step and inputs.get(CACHE) is not None and not self.model.has_softmax_layers:
            if self.mode == "student" and inputs.get("position_ids") is not None:
                inputs.pop("attention_mask", None)  # generate appends real tokens only
        cache, mask = inputs.get(CACHE), inputs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and isinstance(cache, LizardCache) and cache.mask_columns is not None:
            to_come = cache.mask_columns - mask.shape[1]
            if to_come > 0 and self.model.has_softmax_layers:
                inputs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), to_come)], 1)
        return inputs

    def _update_model_kwargs_for_generation(
        self: Any, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """As transformers', without a mask and positions that grow with the text where no step reads them."""
        steps = running_steps(self)
        advanced = None if steps is None else steps.advance(model_kwargs)
        if advanced is None and "num_new_tokens" not in kwargs:  # drafts are checked against the whole mask
            advanced = self._without_the_past(model_kwargs)
        if advanced is not None:
            return advanced | {CACHE: outputs[CACHE]}
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)  # type: ignore[misc]

    def _without_the_past(self: Any, model_kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """The arguments of ``generate`` for the next step, with the last positions [B, 1] alone and no mask, as
        ``prepare_inputs_for_generation`` would leave of them; None where a step may read more."""
        positions, cache = model_kwargs.get("position_ids"), model_kwargs.get(CACHE)
        if self.mode != "student" or self.model.has_softmax_layers or not isinstance(cache, LizardCache):
            return None
        own = "prepare_inputs_for_generation" not in vars(self)  # peft's reads the mask
        if positions is None or positions.ndim != 2 or model_kwargs.get("token_type_ids") is not None or not own:
            return None
        return model_kwargs | {"position_ids": positions[:, -1:] + 1, "attention_mask": None}

    def _prefill(
        self: Any, input_ids: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers', where a prompt in pieces is read without compiling, as one in a single piece is.

        Each length of piece would be a graph more, and as a CUDA graph keep what thousands of tokens need for good.
        """
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
        if self.mode == "student" and generation_config.prefill_chunk_size is not None:
            generation_config = copy.copy(generation_config)
            generation_config.disable_compile = True
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


def _read(logits: Tensor, cache: Cache | None) -> CausalLMOutputWithPast:
    held: dict[str, Any] = {CACHE: cache}
    return CausalLMOutputWithPast(logits=logits, **held)


def share_of_items(labels: Tensor | None, shift_labels: Tensor | None, items: Tensor | int) -> Tensor:
    """Of ``items`` labels, the share in this forward, counted as a Trainer does: those that predict, not -100."""
    if shift_labels is None and labels is None:
        raise ValueError("num_items_in_batch: got a number, but no labels of which to count those of this forward")
    here = shift_labels if shift_labels is not None else labels[..., 1:]  # type: ignore[index]
    return here.ne(-100).sum() / items
