"""Tiny models written as GGUF, as llama.cpp writes them, and its quantised blocks read by their definition."""

from __future__ import annotations

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

LLAMA = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
GEMMA3 = LLAMA | {
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
BLOCK_BYTES = {Kind.Q8_0: (32, 34), Kind.Q5_0: (32, 22), Kind.Q4_K: (256, 144), Kind.Q6_K: (256, 210)}


def write_gguf(path, kind, model, tokenizer, quantised=None, skip=(), extra=()) -> dict[str, np.ndarray]:
    """A model of transformers as GGUF of the architecture ``kind``.

    tokenizer: a function that writes its metadata. quantised: name in GGUF without block and suffix -> type, whose
    blocks are drawn at random; what these are worth comes back by the whole name in GGUF. skip: names left out.
    """
    config, draw = model.config, np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), kind)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if kind == "llama":
        writer.add_vocab_size(config.vocab_size)
    if kind == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    tokenizer(writer)
    names, worth = GEMMA3 if kind == "gemma3" else LLAMA, {}
    for ours, weight in model.state_dict().items():
        module, suffix = ours.rsplit(".", 1)
        prefix = ""
        if module.startswith("model.layers."):
            _, _, block, module = module.split(".", 3)
            prefix = f"blk.{block}."
        name = f"{prefix}{names[module]}.{suffix}"
        if names[module] in skip or (name == "output.weight" and config.tie_word_embeddings):
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(names[module])
        if kind == "llama" and heads:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        values = np.ascontiguousarray(weight.detach().numpy())
        if kind == "gemma3" and names[module].endswith("norm"):
            values = values + 1
        if suffix == "weight" and names[module] in (quantised or {}):
            form = quantised[names[module]]
            raw, worth[name] = random_blocks(form, *values.shape, draw)
            writer.add_tensor(name, raw, raw_dtype=form)
        else:
            writer.add_tensor(name, values)
    for name in extra:
        writer.add_tensor(name, np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return worth


def byte_level(tokenizer, merges=(), pre=None, **ids):
    """Metadata of a byte-level tokenizer whose first three tokens are special."""

    def write(writer) -> None:
        writer.add_tokenizer_model("gpt2")
        if pre:
            writer.add_tokenizer_pre(pre)
        tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
        writer.add_token_list(tokens)
        writer.add_token_types([3] * 3 + [1] * (len(tokens) - 3))
        writer.add_token_merges([" ".join(merge) for merge in merges])
        for name, value in ids.items():
            getattr(writer, f"add_{name}_token_id")(value)
        writer.add_chat_template("{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")

    return write


def random_blocks(kind, rows, columns, draw) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of a type as bytes, and what they are worth."""
    length, size = BLOCK_BYTES[kind]
    blocks = draw.integers(0, 256, (rows * columns // length, size)).astype(np.uint8)
    scales = (draw.random((len(blocks), 2)) * 0.01 + 1e-3).astype(np.float16).view(np.uint8)
    if kind == Kind.Q6_K:
        blocks[:, -2:] = scales[:, :2]
    else:
        blocks[:, : 4 if kind == Kind.Q4_K else 2] = scales[:, : 4 if kind == Kind.Q4_K else 2]
    worth = np.array([WORTH[kind](block) for block in blocks], np.float32)
    return blocks.reshape(rows, -1), worth.reshape(rows, columns)


def _half(pair) -> float:
    return float(np.frombuffer(pair.tobytes(), np.float16)[0])


def _q8_0(block):
    return [_half(block[:2]) * q for q in block[2:].view(np.int8).tolist()]


def _q5_0(block):
    d, high, low = _half(block[:2]), int.from_bytes(block[2:6].tobytes(), "little"), block[6:].tolist()
    nibbles = [q & 15 for q in low] + [q >> 4 for q in low]
    return [d * (q + 16 * (high >> j & 1) - 16) for j, q in enumerate(nibbles)]


def _q4_k(block):
    d, least, packed, quants = _half(block[:2]), _half(block[2:4]), block[4:16].tolist(), block[16:].tolist()
    values = []
    for part in range(8):
        if part < 4:
            scale, minimum = packed[part] & 63, packed[part + 4] & 63
        else:
            scale = packed[part + 4] & 15 | packed[part - 4] >> 6 << 4
            minimum = packed[part + 4] >> 4 | packed[part] >> 6 << 4
        for q in quants[part // 2 * 32 : part // 2 * 32 + 32]:
            values.append(d * scale * (q >> 4 if part % 2 else q & 15) - least * minimum)
    return values


def _q6_k(block):
    low, high, scales = block[:128].tolist(), block[128:192].tolist(), block[192:208].view(np.int8).tolist()
    d, values = _half(block[208:]), []
    for i in range(256):
        half, within = divmod(i, 128)
        quarter, place = divmod(within, 32)
        byte = low[half * 64 + quarter % 2 * 32 + place]
        top = high[half * 32 + place] >> 2 * quarter & 3
        q = (byte >> 4 if quarter > 1 else byte & 15) + 16 * top - 32
        values.append(d * scales[i // 16] * q)
    return values


WORTH = {Kind.Q8_0: _q8_0, Kind.Q5_0: _q5_0, Kind.Q4_K: _q4_k, Kind.Q6_K: _q6_k}
