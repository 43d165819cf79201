"""Teachers whose queries and keys have large biases, as Qwen2's: the features of their students vary with the token."""

import copy

import pytest
import torch
from tiny import teacher, tokens
from transformers import AutoModelForCausalLM

from lizard_models import LizardConfig, linearize

PLAIN = LizardConfig.preset("plain", attention={"window": 8})


def biased(family: str = "qwen2", **changes):
    made = teacher(family, **changes)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith(("q_proj.bias", "k_proj.bias")):
                parameter.copy_(100 * torch.randn(parameter.shape, generator=draw))
    return made


def maps(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.lizard_parameters() if ".feature_maps." in n}


def variation(model, ids) -> float:
    """The least total variation between the features of the tokens and their mean, of all layers, heads and signs."""
    seen = []
    hooks = [
        made.register_forward_hook(lambda _, __, out: seen.append(out[1].detach()))
        for attention in model.lizard_attentions()
        for made in attention.lizard.feature_maps.children()
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    features = [(sign * t.float()).softmax(-1).flatten(0, 1) for t in seen for sign in (1, -1)]
    return min((f - f.mean(0)).abs().sum(-1).mean(0).min().item() / 2 for f in features)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_vary_with_the_token(dtype):
    made, ids = biased().to(dtype), tokens(2, 30)
    model = linearize(made, PLAIN)
    assert variation(model, ids) > 0.05
    for attention in model.lizard_attentions():
        for part in attention.lizard.feature_maps.children():
            part.reset_parameters()
    assert variation(model, ids) < 1e-3


@torch.no_grad()
def test_the_untrained_student_is_its_teacher_within_the_window():
    made, ids = biased(), tokens(2, 24)
    model = linearize(made, LizardConfig.preset("plain", attention={"window": 24}))
    assert (model(ids).logits - made(ids).logits).abs().max() < 1e-3


@pytest.mark.parametrize(
    ("family", "preset", "changes"),
    [
        ("qwen3", "plain", dict(attention_bias=True)),  # a norm between projection and map
        ("gemma3_text", "plain", dict(attention_bias=True)),
        ("qwen2", "lolcats", {}),  # RoPE between them
        ("smollm3", "plain", {}),  # no bias
    ],
)
def test_maps_that_do_not_read_the_bias_start_as_ever(family, preset, changes):
    model = linearize(biased(family, **changes), LizardConfig.preset(preset, attention={"window": 8}))
    plain = copy.deepcopy(model)
    for attention in plain.lizard_attentions():
        for part in attention.lizard.feature_maps.children():
            part.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(maps(model).values(), maps(plain).values(), strict=True))


def test_a_saved_student_is_loaded_as_it_was(tmp_path):
    model = linearize(biased(), PLAIN)
    with torch.no_grad():
        for name, parameter in model.lizard_parameters():
            if ".feature_maps." in name:
                parameter.fill_(0.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all((t == 0.5).all() for t in maps(loaded).values())
