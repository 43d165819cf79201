"""Teachers of a few thousand random weights and the students made of them."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from lizard_models import LizardConfig, linearize

SIZE = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=None,
    pad_token_id=0,
)
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "mistral": (MistralConfig, MistralForCausalLM)}


def teacher(family: str = "llama", **changes):
    """A random teacher in eval mode. ``initializer_range`` is large so that attention is far from uniform."""
    config_class, model_class = FAMILIES[family]
    if family == "mistral":
        changes = {"sliding_window": None} | changes
    torch.manual_seed(0)
    return model_class(config_class(**SIZE | changes)).eval()


def student(preset: str = "recommended", family: str = "llama", window: int = 8, seed: int | None = 1, **changes):
    """The student of ``teacher`` with a window short enough to leave; new parameters disturbed unless seed is None."""
    config = LizardConfig.preset(preset, attention={"window": window})
    kept = changes.pop("softmax_layers", ())
    model = linearize(teacher(family, **changes), config.replace(softmax_layers=kept))
    if seed is not None:
        disturb(model, seed)
    return model.requires_grad_(False)


def disturb(model, seed: int = 1) -> None:
    """Move every new parameter off its start, so that none is without effect."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.lizard_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def tokens(rows: int, length: int, seed: int = 2) -> torch.Tensor:
    """Random tokens [rows, length], none of them padding."""
    return torch.randint(2, SIZE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
