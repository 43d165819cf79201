"""GGUF as ordinary folders: every architecture, every type of the packaged teachers, and tokenizers."""

import numpy as np
import pytest
import torch
from readable import byte_tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from lizard_models.teachers.gguf import convert_gguf
from lizard_models.teachers.gguf_tokenizers import tokenizer_from

gguf = pytest.importorskip("gguf")
from tiny_gguf import Kind, byte_level, write_gguf  # noqa: E402  needs gguf

SHAPE = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
TEXT = "Year 1984, wind & mill — été\n\n  def f(x):\n\treturn x**2  # I'll go\r\n"
BASIC = byte_level(byte_tokenizer((("i", "n"),)), [("i", "n")], bos=1, eos=2, unk=0, pad=0)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = SHAPE | {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    rope = {"rope_type": "default", "rope_theta": 1234.0}
    return LlamaForCausalLM(LlamaConfig(**shape, rms_norm_eps=1e-5, rope_parameters=rope)).eval()


def test_gguf_becomes_the_same_llama(tmp_path):
    """A Llama written to GGUF as llama.cpp does comes back with equal weights, logits and tokens."""
    tokenizer, model = byte_tokenizer((("i", "n"),)), llama()
    write_gguf(tmp_path / "x.gguf", "llama", model, BASIC)
    convert_gguf(tmp_path / "x.gguf", tmp_path)

    back = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.arange(40).view(2, 20)
    assert torch.equal(back(tokens).logits, model(tokens).logits)
    ids = tokenizer(TEXT)["input_ids"]
    assert AutoTokenizer.from_pretrained(tmp_path)(TEXT)["input_ids"] == ids
    assert AutoTokenizer.from_pretrained(tmp_path).decode(ids) == TEXT
    saved = (tmp_path / "config.json").read_text()
    assert '"rope_theta": 1234.0' in saved and "rope_parameters" in saved and "quantization" not in saved


def test_qwen2_is_read_in_every_type(tmp_path):
    """Blocks of each type are worth what their definition says, biases and an output of its own are kept, and rows of
    q and k stay where they are."""
    torch.manual_seed(0)
    shape = SHAPE | {"num_hidden_layers": 1, "vocab_size": 260, "hidden_size": 256, "intermediate_size": 256}
    rope = {"rope_type": "default", "rope_theta": 1e6}
    model = Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=False, rope_parameters=rope)).eval()
    for name, bias in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(bias)
    types = {"attn_q": Kind.Q5_0, "attn_k": Kind.Q8_0, "ffn_down": Kind.Q4_K, "ffn_up": Kind.Q6_K, "output": Kind.Q8_0}
    metadata = byte_level(byte_tokenizer((("i", "n"),)), [("i", "n")], "qwen2", bos=1, eos=2, pad=0)
    worth = write_gguf(tmp_path / "x.gguf", "qwen2", model, metadata, types)
    convert_gguf(tmp_path / "x.gguf", tmp_path / "half", torch.bfloat16)
    convert_gguf(tmp_path / "x.gguf", tmp_path)

    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    places = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "ffn_down": "mlp.down_proj"}
    places |= {"ffn_up": "mlp.up_proj"}
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for name, values in worth.items():
        *block, kind, _ = name.split(".")
        expected[f"model.layers.0.{places[kind]}.weight" if block else "lm_head.weight"] = torch.from_numpy(values)
    found = back.state_dict()
    assert len(worth) == len(types) and found.keys() == expected.keys() and back.dtype == torch.float32
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-6, atol=1e-7, msg=name)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16
    assert torch.equal(half.model.layers[0].mlp.up_proj.weight, back.model.layers[0].mlp.up_proj.weight.bfloat16())
    ours = AutoTokenizer.from_pretrained(tmp_path)
    assert ours.apply_chat_template([{"role": "user", "content": "mill"}], tokenize=False) == "<user>mill"
    assert ours.eos_token == "</s>" and ours.model_max_length == 128


def test_gemma3_keeps_norms_layers_and_both_ropes(tmp_path):
    torch.manual_seed(0)
    rope = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in (
        ("full_attention", 1e6), ("sliding_attention", 1e4))}  # fmt: skip
    shape = SHAPE | {"num_hidden_layers": 6, "num_key_value_heads": 1, "vocab_size": 260, "hidden_size": 48}
    config = Gemma3TextConfig(**shape, intermediate_size=64, head_dim=16, query_pre_attn_scalar=16, sliding_window=5,
                              rope_parameters=rope)  # fmt: skip
    model = Gemma3ForCausalLM(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(weight)
    write_gguf(tmp_path / "x.gguf", "gemma3", model, BASIC)
    convert_gguf(tmp_path / "x.gguf", tmp_path)

    back = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(back) is Gemma3ForCausalLM
    assert back.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    tokens = torch.arange(40).view(2, 20)
    torch.testing.assert_close(back(tokens).logits, model(tokens).logits, rtol=0, atol=1e-5)
    assert '"rope_local_base_freq": 10000.0' in (tmp_path / "config.json").read_text()


def test_files_that_do_not_fit_are_named(tmp_path):
    path = tmp_path / "x.gguf"
    for kind, skip, extra, reason in (
        ("falcon", (), (), "'falcon'; wanted llama, qwen2, gemma3"),
        ("llama", ("ffn_up",), (), r"layers.0.mlp.up_proj.weight is nothing, wanted \(96, 64\) \(2 such"),
        ("llama", (), ("rope_freqs.weight",), "no weight of llama is known by the name 'rope_freqs.weight'"),
        ("qwen2", (), (), r"k_proj.bias is nothing, wanted \(32,\)"),
    ):
        write_gguf(path, kind, llama(), BASIC, skip=skip, extra=extra)
        with pytest.raises(ValueError, match=reason):
            convert_gguf(path, tmp_path / "out")


def test_qwen2_cuts_text_as_its_own_tokenizer():
    """Against transformers' Qwen2Tokenizer of the same vocabulary, on text whose cuts differ from other tokenizers'."""
    merges = [("Ġ", "w"), ("i", "n"), ("Ġw", "in"), ("1", "9"), ("Ċ", "Ċ"), ("Ġ", "Ġ"), ("'", "l"), ("'l", "l")]
    bytes_ = byte_tokenizer(tuple(merges))
    vocabulary = bytes_.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    metadata = {
        "model": "gpt2", "pre": "qwen2", "tokens": tokens, "token_type": [3] * 3 + [1] * (len(tokens) - 3),
        "merges": [" ".join(merge) for merge in merges], "eos_token_id": 2, "padding_token_id": 0,
        "add_bos_token": False,
    }  # fmt: skip
    ours = tokenizer_from({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, 64)
    theirs = Qwen2Tokenizer(vocabulary, merges, unk_token="<pad>", eos_token="</s>", pad_token="<pad>")
    for text in (TEXT, "1999 e\u0301 WIN'LL  win\n\n\n win", "a\u00a0b  \n\t\n", "</s>win<pad>", "日本語 mill"):
        ids = ours(text)["input_ids"]
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(theirs(text)["input_ids"])
    assert ours("1999")["input_ids"] == [vocabulary[c] for c in "1999"] and ours("</s>")["input_ids"] == [2]


PIECES = {"▁w": -3.0, "in": -1.0, "▁win": -5.0, "wi": -2.0, "win": -4.0, "d▁": -2.5, "nd": -0.5, "▁": -9.0} | {
    c: -10.0 - i for i, c in enumerate("wind,e")
}


def sentence_pieces(text: str, scores: dict[str, float], defined: tuple[str, ...]) -> list[str]:
    """SentencePiece's BPE by its definition: user-defined tokens stand, then the best neighbours are joined."""
    text, parts = text.replace(" ", "▁"), []
    while text:
        whole = next((d for d in sorted(defined, key=len, reverse=True) if text.startswith(d)), "")
        parts.append((whole or text[0], bool(whole)))
        text = text[len(parts[-1][0]) :]
    while True:
        joins = [
            (-scores[a + b], i) for i, ((a, fixed), (b, also)) in enumerate(zip(parts, parts[1:], strict=False))
            if not fixed and not also and a + b in scores
        ]  # fmt: skip
        if not joins:
            return [piece for piece, _ in parts]
        i = min(joins)[1]
        parts[i : i + 2] = [(parts[i][0] + parts[i + 1][0], False)]


def test_gemma_joins_by_score_and_falls_back_to_bytes():
    defined = ("\n\n", "▁▁", "▁▁▁", "<b>")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, *(f"<0x{b:02X}>" for b in range(256)), *defined, *PIECES]
    types = [3] * 4 + [6] * 256 + [4] * len(defined) + [1] * len(PIECES)
    metadata = {
        "model": "llama", "tokens": tokens, "token_type": types, "add_bos_token": True, "add_space_prefix": False,
        "scores": [-1000.0] * (260 + len(defined)) + list(PIECES.values()),
        "bos_token_id": 2, "eos_token_id": 1, "unknown_token_id": 3, "padding_token_id": 0,
    }  # fmt: skip
    ours = tokenizer_from({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, 64)
    draw = np.random.default_rng(0)
    alphabet = [*"wwiinndd ,e ", "\n\n", "<b>", "é", "\n", "z"]
    for _ in range(200):
        text = "".join(alphabet[i] for i in draw.integers(0, len(alphabet), draw.integers(1, 16)))
        expected = [2]
        for piece in sentence_pieces(text, PIECES, defined):
            expected += [tokens.index(piece)] if piece in tokens else [4 + byte for byte in piece.encode()]
        assert ours(text)["input_ids"] == expected, text
        assert ours.decode(expected[1:]) == text
    assert ours("<eos>in", add_special_tokens=False)["input_ids"] == [1, tokens.index("in")]


def test_unknown_tokenizers_are_refused():
    for kind, cut in (("gpt2", "llama-bpe"), ("bert", "default")):
        metadata = {"model": kind, "pre": cut, "tokens": [], "token_type": []}
        with pytest.raises(ValueError, match=f"its tokenizer is '{kind}' cut by '{cut}'"):
            tokenizer_from({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}, 64)
