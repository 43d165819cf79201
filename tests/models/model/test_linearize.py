"""``linearize``: equal to the teacher where it should be, around the teacher's own weights, clear when it cannot."""

import pytest
import torch
from tiny import student, teacher, tokens
from transformers import (
    Gemma3Config,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
    MambaConfig,
    MixtralConfig,
    Phi3Config,
    T5Config,
)

import lizard_models
from lizard_models import LizardConfig, linearize
from lizard_models.model.families.llama import LizardLlamaForCausalLM
from lizard_models.model.families.mistral import LizardMistralForCausalLM
from lizard_models.model.families.support import family_of


def largest_difference(a, b) -> float:
    return (a - b).abs().max().item()


@torch.no_grad()
@pytest.mark.parametrize("preset", ["plain", "lolcats", "window_only"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_untrained_student_equals_the_teacher_up_to_the_window(family, preset):
    made, ids = teacher(family), tokens(2, 24)
    model = linearize(made, LizardConfig.preset(preset, attention={"window": 24}))
    assert largest_difference(model(ids).logits, made(ids).logits) < 1e-4
    longer = tokens(2, 40)
    assert largest_difference(model(longer).logits, made(longer).logits) > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    "changes",
    [
        dict(num_key_value_heads=4),
        dict(num_key_value_heads=1),
        dict(head_dim=32),
        dict(tie_word_embeddings=True),
        dict(attention_bias=True, mlp_bias=True),
    ],
    ids=["ungrouped", "one_key_head", "head_dim", "tied", "bias"],
)
def test_every_shape_of_llama(changes):
    made, ids = teacher(**changes), tokens(2, 24)
    model = linearize(made, LizardConfig.preset("plain", attention={"window": 24}))
    assert largest_difference(model(ids).logits, made(ids).logits) < 1e-4


@torch.no_grad()
def test_sliding_window_mistral():
    made = teacher("mistral", sliding_window=16)
    model = linearize(made, LizardConfig.preset("plain", attention={"window": 16}))
    ids = tokens(2, 16)
    assert largest_difference(model(ids).logits, made(ids).logits) < 1e-4
    with pytest.raises(ValueError, match="window=17 is wider than the teacher's sliding window of 16"):
        linearize(made, LizardConfig.preset("plain", attention={"window": 17}))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_teacher_mode_is_the_teacher(family):
    made = teacher(family, **({"sliding_window": 10} if family == "mistral" else {}))
    model, ids = linearize(made, LizardConfig.preset("paper", attention={"window": 8})), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    model.set_attention_mode("teacher")
    assert torch.equal(model(ids, attention_mask=mask).logits, made(ids, attention_mask=mask).logits)
    theirs = made.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False), theirs)


def test_weights_are_shared_not_copied():
    made = teacher(tie_word_embeddings=True)
    model = linearize(made, LizardConfig.preset("plain"))
    ours, theirs = dict(model.named_parameters()), dict(made.named_parameters())
    new = {name for name, _ in model.lizard_parameters()}
    assert set(ours) == set(theirs) | new and not set(theirs) & new
    assert all(ours[name] is theirs[name] for name in theirs)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not any(p.is_meta for p in ours.values())


@torch.no_grad()
@pytest.mark.parametrize("kept", [(0,), (1,), (0, 2), (0, 1, 2)])
def test_softmax_layers_are_the_teachers(kept):
    model, ids = student(softmax_layers=kept), tokens(2, 40)
    assert len(model.lizard_attentions()) == 3 - len(kept)
    assert not any(f"layers.{i}." in name for i in kept for name, _ in model.lizard_parameters())
    if len(kept) == 3:
        assert torch.equal(model(ids).logits, teacher()(ids).logits)


def test_training_flag_and_generation_config_carry_over():
    made = teacher().train()
    made.generation_config.temperature = 0.3
    model = linearize(made, LizardConfig.preset("plain"))
    assert model.training and model.lizard_attentions()[0].lizard.training
    assert model.generation_config.temperature == 0.3
    assert model.config.architectures == ["LizardLlamaForCausalLM"]


def test_new_parameters_are_float32_in_a_half_precision_teacher():
    model = linearize(teacher().bfloat16(), LizardConfig.preset("plain"))
    assert model.dtype == torch.bfloat16
    assert {p.dtype for _, p in model.lizard_parameters()} == {torch.float32}
    ids = tokens(1, 20)
    assert model(ids).logits.dtype == torch.bfloat16


def test_meta_teachers_convert_without_memory():
    with torch.device("meta"):
        made = teacher()
    model = linearize(made, LizardConfig.preset("plain"))
    assert all(p.is_meta for p in model.parameters())


def test_families():
    assert isinstance(linearize(teacher(), LizardConfig.preset("liger")), LizardLlamaForCausalLM)
    assert isinstance(linearize(teacher("mistral"), LizardConfig.preset("liger")), LizardMistralForCausalLM)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(), "MambaMixer has no separate q_proj"),
        (Phi3Config(), "Phi3Attention has no separate q_proj, k_proj, v_proj"),
        (MixtralConfig(), "no adapter says yet how type 'mixtral'"),
        (Gemma3Config(), "type 'gemma3' reads more than text"),
        (T5Config(), "type 't5' is no causal language model"),
    ],
)
def test_other_architectures_hear_what_is_missing(config, message):
    with pytest.raises(ValueError, match=f"{message}.*; supported are llama, mistral, qwen2, .*gemma3_text"):
        family_of(config)


def test_what_cannot_be_converted_says_why():
    recommended = LizardConfig.preset("plain")
    with pytest.raises(ValueError, match="GPT2Attention has no separate q_proj.*supported are llama"):
        linearize(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=9)), recommended)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification, without the head.*wanted a LlamaForCausalLM"):
        linearize(LlamaForSequenceClassification(teacher().config), recommended)
    with pytest.raises(ValueError, match="layer 1 attends in both directions: only causal attention"):
        linearize(teacher("gemma3_text", use_bidirectional_attention=True), recommended)
    with pytest.raises(ValueError, match="LizardLlamaForCausalLM already"):
        linearize(student(), recommended)
    with pytest.raises(ValueError, match=r"softmax_layers=\[3\], but the model has layers 0 to 2"):
        linearize(teacher(), recommended.replace(softmax_layers=(3,)))
    with pytest.raises(ValueError, match="has no Lizard choices"):
        LizardLlamaForCausalLM(LizardLlamaForCausalLM.config_class(**teacher().config.to_dict()))


def test_public_names_resolve():
    assert all(getattr(lizard_models, name) is not None for name in lizard_models.__all__)
    with pytest.raises(AttributeError, match="no attribute 'linearise'"):
        lizard_models.linearise  # noqa: B018
