"""transformers' test case of a causal language model, made to fit Lizard models: what listed.OVERRIDDEN names."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any
from unittest import mock

import tests.generation.test_utils as generation_tests
import tests.test_modeling_common as common_tests
from listed import NO_MATRICES, fnmatch
from tests.causal_lm_tester import CausalLMModelTest as TransformersCase
from tests.causal_lm_tester import CausalLMModelTester
from transformers import GenerationMixin
from variants import SHORT, Variant

from lizard_layers import empty_state, tensors_of
from lizard_models import LizardCache, LizardConfig
from lizard_models.model.cache_layer import LizardCacheLayer
from lizard_models.model.causal_lm import LizardCausalLM
from lizard_models.model.families import FAMILIES, load_family
from lizard_models.model.layer_configs import attention_config, converted_layers

names_of = common_tests.get_values
CAUSAL = [load_family(family) for family in FAMILIES]


def names_with_ours(mapping: Any) -> list[str]:
    """Names of the classes in one of transformers' tables, and ours."""
    ours = {
        id(common_tests.MODEL_MAPPING_NAMES): [c.decoder_class.__name__ for c in CAUSAL],
        id(common_tests.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES): [c.__name__ for c in CAUSAL],
    }
    return [*names_of(mapping), *ours.get(id(mapping), [])]


common_tests.get_values = names_with_ours


class ByLayers(type):
    """A class whose instances are the Lizard caches with layers that can be compiled, or with others."""

    compileable: bool

    def __instancecheck__(cls, cache: Any) -> bool:
        return isinstance(cache, LizardCache) and cache.is_compileable is cls.compileable


def with_kinds_of_caches() -> Any:
    """StaticCache and DynamicCache are for Lizard caches what ``cache_implementation`` asked for."""
    kinds = {
        name: ByLayers(name, (), {"compileable": name == "StaticCache"}) for name in ("StaticCache", "DynamicCache")
    }
    return mock.patch.multiple(generation_tests, **kinds)


class LizardTester(CausalLMModelTester):
    variant: Variant

    def __init__(self, parent: Any) -> None:
        chosen = LizardConfig.preset(self.variant.preset, **SHORT).replace(**self.variant.changes)
        super().__init__(parent, lizard=chosen.to_dict(), **self.variant.fields)

    def prepare_config_and_inputs(self) -> tuple[Any, ...]:
        config, input_ids, types, mask, *labels = super().prepare_config_and_inputs()
        return config, input_ids, types, mask.flip(1) if self.variant.pads_left else mask, *labels


class LizardCase(TransformersCase):
    @property
    def has_attentions(self) -> bool:
        return not any(fnmatch(self._testMethodName, name) for name in NO_MATRICES)

    def _check_past_key_values_for_generate(
        self, batch_size: int, past_key_values: Any, seq_length: int, config: Any
    ) -> None:
        converted = converted_layers(config)
        self.assertEqual(len(past_key_values), config.num_hidden_layers)
        for i, layer in enumerate(past_key_values.layers):
            self.assertEqual(isinstance(layer, LizardCacheLayer), i in converted)
            if i in converted:
                self.assertEqual(layer.get_seq_length(), seq_length)
                states = (layer.state, empty_state(attention_config(config, i), batch_size))
                shapes = [{name: t.shape for name, t in tensors_of(state).items()} for state in states]
                self.assertEqual(*shapes)
            else:
                for t, shape in zip(
                    (layer.keys, layer.values), self._get_attention_shape(batch_size, seq_length, config), strict=True
                ):
                    self.assertEqual(t.shape, shape)

    def test_capture_outputs_decorator(self) -> None:
        with contextlib.ExitStack() as stack:
            for model_class in self.all_model_classes:
                recorded = {k: what for k, what in model_class._can_record_outputs.items() if k != "attentions"}
                stack.enter_context(mock.patch.object(model_class, "_can_record_outputs", recorded))
            super().test_capture_outputs_decorator()

    def test_generate_with_static_cache(self) -> None:
        with with_kinds_of_caches():
            super().test_generate_with_static_cache()

    def test_generate_compile_model_forward_fullgraph(self) -> None:
        with with_kinds_of_caches():
            super().test_generate_compile_model_forward_fullgraph()

    def test_generate_from_inputs_embeds_with_static_cache(self) -> None:
        with with_kinds_of_caches():
            super().test_generate_from_inputs_embeds_with_static_cache()

    def test_inherits_generation_mixin(self) -> None:
        self.assertIn(GenerationMixin, LizardCausalLM.__bases__)
        for model_class in self.all_generative_model_classes:
            self.assertIn(LizardCausalLM, model_class.__bases__)

    def test_recurrent_layers_mask_padding_on_continued_forward(self) -> None:
        prepare = self.model_tester.prepare_config_and_inputs_for_common

        def telling() -> Any:
            config, inputs = prepare()

            def tell_once(**_: Any) -> Any:
                del config.get_text_config
                return SimpleNamespace(layer_types=["linear_attention"])

            config.get_text_config = tell_once
            return config, inputs

        with mock.patch.object(self.model_tester, "prepare_config_and_inputs_for_common", telling):
            super().test_recurrent_layers_mask_padding_on_continued_forward()


del TransformersCase, CausalLMModelTester  # not to be collected
