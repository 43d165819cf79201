"""Tokenizers rebuilt from a GGUF file's metadata: byte-level BPE of two kinds, and SentencePiece's BPE."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # GGUF's types of tokens
SPACE = "\u2581"  # what stands for a space in SentencePiece's tokens
# How Qwen2 cuts text before its merges: contractions, words with what precedes them, single digits, signs, spaces.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DIGITS = ("smollm", "default")


def tokenizer_from(metadata: dict[str, Any], longest: int) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF file's metadata describe, with its chat template. longest: tokens of a text.

    - ``gpt2`` with the cut of ``smollm`` (or none named): byte-level BPE, digits split one by one.
    - ``gpt2`` with the cut of ``qwen2``: the same on text in the form NFC, cut by ``QWEN2_WORDS``.
    - ``llama``: BPE as SentencePiece does it. Of the pairs of neighbours that make a token, the one whose token has the
      highest score is joined first; characters without a token become bytes; tokens defined by the user are found
      before anything else, the longest first.

    The beginning is added before a text where the metadata say so, and nothing else. Raises ValueError for another kind
    of tokenizer or cut.
    """
    kind, cut = metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre", "default")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    named = {
        f"{name}_token": tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{key}_token_id" in metadata
    }
    if kind == "gpt2" and (cut == "qwen2" or cut in DIGITS):
        merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
        _cut_words(tokenizer, cut)
    elif kind == "llama":
        tokenizer = _sentence_pieces(vocabulary, types, metadata, named["unk_token"])
    else:
        raise ValueError(
            f"gguf: its tokenizer is {kind!r} cut by {cut!r}; wanted 'llama', or 'gpt2' cut by qwen2 or "
            f"{' or '.join(DIGITS)}"
        )
    typed = list(zip(tokens, types, strict=True))
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in typed if k == CONTROL])
    tokenizer.add_tokens(
        [AddedToken(t, normalized=SPACE in t, special=False) for t, k in typed if k == USER_DEFINED]
    )  # what has spaces in it is found where they have become SPACE
    if metadata.get("tokenizer.ggml.add_bos_token"):
        begin = named["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", pair=f"{begin} $A {begin} $B", special_tokens=[(begin, vocabulary[begin])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=longest, clean_up_tokenization_spaces=False, **named
    )
    fast.chat_template = metadata.get("tokenizer.chat_template")
    return fast


def _cut_words(tokenizer: Tokenizer, cut: str) -> None:
    if cut == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
        first: Any = pre_tokenizers.Split(Regex(QWEN2_WORDS), behavior="isolated")
    else:
        first = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [first, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=cut != "qwen2")]
    )
    tokenizer.decoder = decoders.ByteLevel()


def _sentence_pieces(vocabulary: dict[str, int], types: list[int], metadata: dict[str, Any], unknown: str) -> Tokenizer:
    scores = metadata["tokenizer.ggml.scores"]
    joined = {token: i for token, i in vocabulary.items() if types[i] == NORMAL}
    ranked = sorted(
        (-scores[i], i, cut, token) for token, i in joined.items() for cut in range(1, len(token))
        if token[:cut] in joined and token[cut:] in joined
    )  # fmt: skip
    merges = [(token[:cut], token[cut:]) for _, _, cut, token in ranked]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps: list[Any] = [normalizers.Replace(" ", SPACE)]
    ends: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):  # a word at the beginning is as one after a space
        steps.insert(0, normalizers.Prepend(SPACE))
        ends.append(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer, tokenizer.decoder = normalizers.Sequence(steps), decoders.Sequence(ends)
    return tokenizer
