"""A model in GGUF as an ordinary folder: weights, configuration, tokenizer. Llama, Qwen2 and Gemma 3."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
)

from lizard_models.teachers.gguf_tokenizers import tokenizer_from


def require_gguf() -> None:
    """Raises ValueError if the package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("teacher: GGUF weights need the package gguf; pip install 'lizard-attn[demo]'")


def convert_gguf(gguf: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes a Llama, Qwen2 or Gemma 3 in GGUF as an ordinary model folder in ``dtype``.

    Weights of any type that the package gguf reads back (Q4_K, Q5_0, Q6_K, Q8_0, ...) are written as it reads them,
    rounded to ``dtype``; an output that the file stores apart from the embeddings stays apart. The tokenizer is rebuilt
    from the file's own metadata, see ``gguf_tokenizers.tokenizer_from``.

    Raises ValueError if the package gguf is missing, for another architecture, and for a file whose tensors are not
    those of its architecture.
    """
    require_gguf()
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    kind = metadata["general.architecture"]
    if kind not in FORMS:
        raise ValueError(f"gguf: {gguf.name} holds the architecture {kind!r}; wanted {', '.join(FORMS)}")
    form = FORMS[kind]
    tokenizer = tokenizer_from(metadata, metadata[f"{kind}.context_length"])
    tokenizer.save_pretrained(folder)
    values = {name.removeprefix(f"{kind}."): value for name, value in metadata.items() if name.startswith(f"{kind}.")}
    shared = _shared_fields(values, tokenizer) | {
        "vocab_size": values.get("vocab_size", len(metadata["tokenizer.ggml.tokens"])),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in reader.tensors),
    }
    config = form.config(values, shared)
    config.dtype = dtype
    with torch.device("meta"):  # names and shapes alone: the weights are held once
        model = AutoModelForCausalLM.from_config(config)
    weights = _weights_from(reader.tensors, form, config, dtype)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    _check_shapes(weights, model.state_dict(), gguf.name)
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(folder)

    path = folder / "config.json"
    saved = json.loads(path.read_text()) | form.older(config.rope_parameters)
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


class Form(NamedTuple):
    """How GGUF stores an architecture."""

    names: dict[str, str]
    """Of its tensors, as those of transformers."""
    config: Callable[[dict[str, Any], dict[str, Any]], PreTrainedConfig]
    """From its own metadata and the fields that every architecture has."""
    older: Callable[[dict[str, Any]], dict[str, Any]]
    """Where transformers 4 looks for the bases of RoPE."""
    interleaved: bool = False
    """Whether the two halves that RoPE rotates alternate in q and k."""
    norm_offset: float = 0.0
    """What is added to the weights of norms."""


LLAMA_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
GEMMA3_NAMES = LLAMA_NAMES | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA3_LOCAL_THETA = 10_000.0  # the format does not hold it, nor that every sixth layer is global
GEMMA3_PERIOD = 6


def _shared_fields(values: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {
        "hidden_size": values["embedding_length"],
        "intermediate_size": values["feed_forward_length"],
        "num_hidden_layers": values["block_count"],
        "num_attention_heads": values["attention.head_count"],
        "num_key_value_heads": values["attention.head_count_kv"],
        "max_position_embeddings": values["context_length"],
        "rms_norm_eps": round(values["attention.layer_norm_rms_epsilon"], 12),  # stored in float32
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _one_rope(values: dict[str, Any]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": values["rope.freq_base"]}}


def _gemma3_config(values: dict[str, Any], shared: dict[str, Any]) -> PreTrainedConfig:
    layers = range(1, shared["num_hidden_layers"] + 1)
    return Gemma3TextConfig(
        **shared,
        head_dim=values["attention.key_length"],
        query_pre_attn_scalar=values["attention.key_length"],
        sliding_window=values["attention.sliding_window"],
        layer_types=["full_attention" if layer % GEMMA3_PERIOD == 0 else "sliding_attention" for layer in layers],
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": values["rope.freq_base"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": GEMMA3_LOCAL_THETA},
        },
    )


def _older_one(rope: dict[str, Any]) -> dict[str, Any]:
    return {"rope_theta": rope["rope_theta"]}


def _older_two(rope: dict[str, Any]) -> dict[str, Any]:
    full, local = rope["full_attention"], rope["sliding_attention"]
    return {"rope_theta": full["rope_theta"], "rope_local_base_freq": local["rope_theta"]}


FORMS = {
    "llama": Form(
        LLAMA_NAMES, lambda values, shared: LlamaConfig(**shared, **_one_rope(values)), _older_one, interleaved=True
    ),
    "qwen2": Form(LLAMA_NAMES, lambda values, shared: Qwen2Config(**shared, **_one_rope(values)), _older_one),
    "gemma3": Form(GEMMA3_NAMES, _gemma3_config, _older_two, norm_offset=1.0),
}


def _weights_from(tensors: list, form: Form, config: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in tensors:
        *block, kind, suffix = tensor.name.split(".")
        if kind not in form.names:
            raise ValueError(f"gguf: no weight of {config.model_type} is known by the name {tensor.name!r}")
        prefix = f"model.layers.{block[1]}." if block else ""
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if form.interleaved and kind in heads:  # [H, D/2, 2, in] -> [H, 2, D/2, in]
            weight = weight.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
        if kind.endswith("norm"):
            weight = weight - form.norm_offset
        weights[f"{prefix}{form.names[kind]}.{suffix}"] = weight.to(dtype)
    return weights


def _check_shapes(found: dict[str, Tensor], wanted: dict[str, Tensor], name: str) -> None:
    """Raises ValueError for weights that are missing, too many or of another shape."""
    wrong = sorted(found.keys() ^ wanted.keys()) or sorted(k for k, w in wanted.items() if found[k].shape != w.shape)
    if wrong:
        first = wrong[0]
        shapes = [tuple(part[first].shape) if first in part else "nothing" for part in (found, wanted)]
        raise ValueError(
            f"gguf: {name} does not hold what its metadata say: {first} is {shapes[0]}, wanted {shapes[1]} "
            f"({len(wrong)} such weights)"
        )
