"""Operations that a step of training needs by its model, for model-flops use: what is computed again does not count.

h hidden, m inner, V vocabulary, L layers, H query and K key heads of D, T tokens a row, N in all, r rank of adapters.
A product with a weight takes two operations for each of its numbers and token, its gradient in the input as many, and
as many for the weight's own where it trains. Attention counts pairs before the causal mask alone.
"""

from __future__ import annotations

from typing import Any

from roofline import Layer, forward_operations

EXACT = ("exact scores", "their weights")  # terms of window and anchors, whose queries and keys stage 1 does not train


def weights(config: Any) -> int:
    """Numbers of the layers' products: L (2 h H D + 2 h K D + 3 h m)."""
    wide, narrow = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    one = config.hidden_size * (2 * wide + 2 * narrow + 3 * config.intermediate_size)
    return config.num_hidden_layers * one


def head(config: Any) -> int:
    return config.vocab_size * config.hidden_size


def attention(config: Any, length: int) -> float:
    """Of softmax attention forward, a token: scores and values with (T + 1) / 2 keys, 2 L H D (T + 1)."""
    return 2 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * (length + 1)


def adapters(model: Any) -> int:
    """Numbers of LoRA's matrices, r (in + out) of each."""
    return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


def layer_of(config: Any, attention: Any, tokens: int) -> Layer:
    """What the counts of a Lizard layer need; maps of ``feature_dim`` columns give twice as many features."""
    heads = {"H": config.num_attention_heads, "K": config.num_key_value_heads, "D": config.head_dim}
    return Layer(N=tokens, **heads, P=attention.feature_dim, W=attention.window, A=attention.anchors)


def of_a_step(stage: str, model: Any, config: Any, attention_config: Any, batch: int, length: int) -> float:
    """Operations of a step; stage as in train_step.py, attention_config the Lizard's where there is one."""
    tokens, softmax = batch * length, attention(config, length)
    whole = weights(config) + head(config)
    if stage == "teacher forward":
        return tokens * (2 * whole + softmax)
    if stage == "teacher LoRA":
        return tokens * (4 * whole + 3 * softmax + 6 * adapters(model))
    terms = forward_operations(layer_of(config, attention_config, tokens))
    lizard = config.num_hidden_layers * sum(t.value for t in terms)
    if stage.startswith("stage 2"):
        teacher = 0 if stage == "stage 2 CE" else tokens * (2 * whole + softmax)
        return teacher + tokens * (4 * whole + 6 * adapters(model)) + 3 * lizard
    trained = config.num_hidden_layers * sum(t.value for t in terms if not t.what.startswith(EXACT))
    output = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * config.hidden_size
    return tokens * (2 * weights(config) + softmax + output) + lizard + 2 * trained
