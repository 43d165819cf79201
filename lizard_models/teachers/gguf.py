"""A Llama in GGUF as an ordinary model folder: weights, configuration, tokenizer."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def require_gguf() -> None:
    """Raises ValueError if the package gguf is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError("teacher: GGUF weights need the package gguf; pip install 'lizard-attn[demo]'")


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Writes a Llama in GGUF with a byte-level BPE tokenizer as an ordinary float32 model folder.

    The tokenizer is rebuilt from the file's own metadata: byte-level BPE, digits split one by one, nothing added
    before or after. Raises ValueError if the package gguf is missing.
    """
    require_gguf()
    from gguf import GGUFReader

    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = _tokenizer_from(metadata)
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=metadata["llama.vocab_size"],
        hidden_size=metadata["llama.embedding_length"],
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=metadata["llama.attention.head_count"],
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        max_position_embeddings=metadata["llama.context_length"],
        rms_norm_eps=round(metadata["llama.attention.layer_norm_rms_epsilon"], 12),  # stored in float32
        rope_parameters={"rope_type": "default", "rope_theta": metadata["llama.rope.freq_base"]},
        tie_word_embeddings=not any(tensor.name == "output.weight" for tensor in reader.tensors),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    weights = _weights_from(reader.tensors, config)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights)
    model.save_pretrained(folder)

    path = folder / "config.json"
    saved = json.loads(path.read_text())
    saved["rope_theta"] = saved["rope_parameters"]["rope_theta"]  # where transformers 4 looks for it
    path.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n")


GGUF_NAMES = {
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


def _weights_from(tensors: list, config: LlamaConfig) -> dict[str, torch.Tensor]:
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in tensors:
        *block, kind, _ = tensor.name.split(".")
        prefix = f"model.layers.{block[1]}." if block else ""
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if kind in heads:  # GGUF interleaves the two halves that RoPE rotates; [H, D/2, 2, in] -> [H, 2, D/2, in]
            weight = weight.unflatten(0, (heads[kind], -1, 2)).transpose(1, 2).flatten(0, 2)
        weights[f"{prefix}{GGUF_NAMES[kind]}.weight"] = weight
    return weights


def _tokenizer_from(metadata: dict) -> PreTrainedTokenizerFast:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    control = 3  # GGUF's token type of special tokens
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == control]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    named = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=metadata["llama.context_length"],
        clean_up_tokenization_spaces=False,
        **named,
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast
