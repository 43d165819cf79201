"""Every test of transformers that Lizard models fail, or run otherwise than it is written, with its reason. One table.

A failing test is run all the same, and must fail with the message given here: one that passes, fails in another way, is
skipped by transformers itself or does not exist is an error. Whatever transformers skips of itself is not listed.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

STRICT = "a checkpoint that lacks weights is refused: a random head or layer would go unnoticed"
ONE_TEXT = (
    "a mask per query lets tokens of one text be read in another order; a state holds what was read, in one order. "
    "2-D padding masks and packed rows are taken"
)

GAPS = "kept sliding-window layers count columns, padding between tokens too, so it is refused"


@dataclass(frozen=True)
class Failing:
    """Tests that Lizard models fail."""

    tests: str  # a pattern of their names
    message: str  # regular expression that the error's text holds
    reason: str
    variants: str = "*"  # patterns of their names, with blanks between

    def holds(self, variant: str, test: str) -> bool:
        return fnmatch(test, self.tests) and any(fnmatch(variant, name) for name in self.variants.split())


FAILING: tuple[Failing, ...] = (
    Failing("test_correct_missing_keys", r"has missing keys: lm_head\.weight", STRICT),
    Failing("test_model_weights_reload_no_missing_tied_weights", r"has missing keys: embed_tokens\.weight", STRICT),
    Failing(
        "test_sdpa_can_dispatch_non_composite_models",
        r"'AttentionConfig' object has no attribute '_attn_implementation'",
        "takes every module whose class is called ...Attention for one of transformers', with its config",
        "[!G]* Gemma3Text",
    ),
    Failing(
        "test_model_rope_scaling_from_config_1_dynamic",
        "True is not false",
        "scales frequencies once a position passes the context: a student keeps its own at any position, whatever its "
        "choice of positions, so that keys in a state and new ones are turned alike; the paper's layers have no RoPE",
    ),
    Failing(
        "test_model_rope_scaling_from_config_[02]_*",
        "True is not false",
        "wants other outputs with other angles: the paper's layers have no RoPE",
        "LlamaPaper",
    ),
    Failing(
        "test_recurrent_layers_mask_padding_on_continued_forward", "has padding between the real tokens", GAPS, "G*"
    ),
    Failing("test_custom_4d_attention_mask", r"wanted \[1, 6\]: one column for each", ONE_TEXT, "[!G]*"),
)

NO_MATRICES = (
    "test_*generate_dict_output*",
    "test_assisted_decoding_*",
    "test_prompt_lookup_*",
    "test_attention_outputs",
    "test_eager_matches_sdpa_inference_*_output_attentions",
    "test_generate_compilation_all_outputs",
    "test_model_outputs_equivalence",
    "test_retain_grad_hidden_states_attentions",
    "test_sliding_window_mask",
)
"""Tests that run with ``has_attentions = False``, as all of Mamba2's do: a converted layer forms no matrix of weights
to return, so ``output_attentions=True`` is refused. The others run as for a model with attention."""

OVERRIDDEN = {
    "_check_past_key_values_for_generate": "looks for keys and values of every position, where a converted layer has a "
    "state of constant size: the sizes of its tensors are compared instead, and kept softmax layers as ever",
    "prepare_config_and_inputs": "pads prompts on the right, and generate appends to them: padding between tokens. "
    "Models with kept sliding-window layers get it on the left: " + GAPS,
    "test_capture_outputs_decorator": "asks for attention matrices too: asked for hidden states alone",
    "test_generate_compile_model_forward_fullgraph": "wants the classes DynamicCache and StaticCache: a LizardCache is "
    "taken for the one or the other by whether it says that it can be compiled",
    "test_generate_from_inputs_embeds_with_static_cache": "the same",
    "test_generate_with_static_cache": "the same",
    "test_inherits_generation_mixin": "wants GenerationMixin among the bases of the class itself: it is among those of "
    "LizardCausalLM, which is",
    "test_recurrent_layers_mask_padding_on_continued_forward": "runs where a config's layer_types name recurrent "
    "layers: told that they do",
}
"""Methods that are replaced, and by what."""

NAMES = "training, loss and resizing look classes up by name in transformers' tables of models: ours are added to them"
