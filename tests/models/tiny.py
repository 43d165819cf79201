"""Teachers of a few thousand random weights and the students made of them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

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
HYBRID = ("softmax_layers", "softmax_share", "keep_sliding_layers", "wide_layers", "wide_window", "wide_gate_stretch")
HEADS = dict(head_dim=16)
GEMMA = HEADS | dict(query_pre_attn_scalar=24)
SLIDING = dict(sliding_window=12, layer_types=["sliding_attention", "full_attention", "full_attention"])
FAMILIES: dict = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, dict(sliding_window=None)),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, HEADS),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {}),
    "gemma2": (
        Gemma2Config,
        Gemma2ForCausalLM,
        GEMMA | SLIDING | dict(attn_logit_softcapping=2.0),
    ),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, GEMMA | SLIDING),
}


def teacher(family: str = "llama", **changes):
    """A random teacher in eval mode. ``initializer_range`` is large so that attention is far from uniform."""
    config_class, model_class, defaults = FAMILIES[family]
    torch.manual_seed(0)
    model = model_class(config_class(**SIZE | defaults | changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_norm" in name or "k_norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)  # fresh norms would hide one that is left out
    return model


def built_once(build: Callable) -> Callable:
    """Copies of what the arguments gave first, a sixth of the cost, and the random state that building left."""
    built: dict[str, tuple[Any, torch.Tensor]] = {}

    @functools.wraps(build)
    def copied(*args, **options):
        here = torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled()
        key = repr((args, sorted(options.items()), here))
        if key not in built:
            built[key] = build(*args, **options), torch.get_rng_state()
        model, random = built[key]
        torch.set_rng_state(random)
        return copy.deepcopy(model)

    return copied


@built_once
def student(preset: str = "plain", family: str = "llama", window: int = 8, seed: int | None = 1, **changes):
    """The student of ``teacher`` with a window short enough to leave; new parameters disturbed unless seed is None."""
    config = LizardConfig.preset(preset, attention={"window": window} | changes.pop("attention", {}))
    own = {name: changes.pop(name) for name in HYBRID if name in changes}
    model = linearize(teacher(family, **changes), config.replace(**own))
    if seed is not None:
        disturb(model, seed)
    return model.requires_grad_(False)


def disturb(model, seed: int = 1) -> None:
    """Move every new parameter off its start, so that none is without effect."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in model.lizard_parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)


def assert_slopes(model, loss) -> None:
    """The gradients of ``loss()`` for each new parameter are central differences of it.

    In float64, but for the norms of the family, which compute in float32: so the steps are long.
    """
    parameters = dict(model.lizard_parameters())
    found = dict(zip(parameters, torch.autograd.grad(loss(), list(parameters.values())), strict=True))
    draw = torch.Generator().manual_seed(0)
    for part in sorted({name.split(".lizard.")[1] for name in parameters}):  # all layers at once
        ways = {
            name: 1e-3 * torch.randn(p.shape, generator=draw, dtype=p.dtype)
            for name, p in parameters.items()
            if name.endswith(part)
        }
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                for name, way in ways.items():
                    parameters[name] += sign * way
                ends.append(loss().item())
                for name, way in ways.items():
                    parameters[name] -= sign * way
        slope = sum((found[name] * way).sum() for name, way in ways.items()).item()
        size = max((found[name].norm() * way.norm()).item() for name, way in ways.items())
        assert abs((ends[0] - ends[1]) / 2 - slope) <= 5e-3 * size + 1e-6 * abs(ends[0]), part


def read_in_pieces(model, ids: torch.Tensor, *ends: int):
    """Logits of ``ids`` read up to each of ``ends`` and then token by token, the cache, its bytes before the steps."""
    cache = model.new_cache()
    read = [model(ids[:, a:b], past_key_values=cache).logits for a, b in zip((0, *ends), ends, strict=False)]
    size = cache.state_bytes()
    read += [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(ends[-1], ids.shape[1])]
    return torch.cat(read, 1), cache, size


def last_read_again(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last 40 of ids [1, 190], taken back and read once more: of more tokens than are remembered, those
    before them become the state to start from."""
    cache = model.new_cache()
    for layer in cache.lizard_layers():
        layer.recall = 40
    cache.activate_past_recording()
    for piece in ids.split([18, 3, 40, 60, *[1] * 9, 30, 30], dim=1):
        model(piece, past_key_values=cache)
    cache.crop(-40)
    return model(ids[:, 150:], past_key_values=cache).logits


def windows(model) -> list[int]:
    """Windows of the converted layers."""
    return [attention.lizard.config.window for attention in model.lizard_attentions()]


def tokens(rows: int, length: int, seed: int = 2) -> torch.Tensor:
    """Random tokens [rows, length], none of them padding."""
    return torch.randint(2, SIZE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(seed))
