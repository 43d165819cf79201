"""A tokenizer of bytes, a saved teacher that reads it, and some text."""

from __future__ import annotations

from pathlib import Path

from tiny import teacher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SENTENCE = "the wind turns the mill and the river runs down to the sea, year {n} after year. "


def byte_tokenizer(merges: tuple[tuple[str, str], ...] = (), around: str = "$A") -> PreTrainedTokenizerFast:
    """One token a byte, and one a merge; 0 pads, 1 begins, 2 ends. around: what it puts around a text, ``<s> $A`` to
    begin it as Gemma's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if around != "$A":
        special = [(token, vocabulary[token]) for token in around.split() if token != "$A"]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=1 << 20
    )


def save_teacher(folder: Path) -> Path:
    """A random Llama with the tokenizer of bytes, as a folder."""
    tokenizer = byte_tokenizer()
    teacher(vocab_size=len(tokenizer), max_position_embeddings=4096).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_texts(folder: Path, count: int = 3, characters: int = 3000) -> Path:
    """A folder of text files."""
    folder.mkdir()
    for n in range(count):
        (folder / f"text-{n}.txt").write_text((SENTENCE.format(n=n) * (characters // len(SENTENCE) + 1))[:characters])
    return folder
