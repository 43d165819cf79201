"""A small random Lizard that writes printable characters, its conversations, and what ``generate`` answers."""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lizard_models import LizardConfig, linearize

PIECE = 8192  # tokens
CHARACTERS = string.ascii_letters + string.digits + " .,;:!?-'()"


class Turn(NamedTuple):
    """A prompt, and the continuation that is right."""

    prompt: str
    answer: str


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character, so that every text of tokens is a text."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*special, *CHARACTERS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def teacher(context: int = 1 << 17) -> Any:
    """A random Llama of four layers that writes characters."""
    words = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, initializer_range=0.2, eos_token_id=None,
        pad_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        model.lm_head.weight[:3] = 0  # the tokens that are no characters
        model.lm_head.weight[3:] *= 4
    return model


def save(model: Any, folder: Path) -> Any:
    """The model with its tokenizer in ``folder``; returns it."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def save_model(folder: Path, kept_layers: tuple[int, ...] = (), context: int = 1 << 17) -> Any:
    """A random Lizard in ``folder``, made of ``teacher``; returns it."""
    chosen = LizardConfig.preset("plain", attention={"window": 32}, softmax_layers=list(kept_layers))
    model = linearize(teacher(context), chosen)
    model.generation_config.eos_token_id = None
    return save(model, folder).eval()


def conversations(model: Any, lengths: list[int], turns: int, tokens: int, seed: int = 0) -> list[list[Turn]]:
    """A conversation for each of ``lengths``, the characters of its first prompt, with ``generate``'s own answers.

    Half of a first prompt is the same in all of them. tokens: of each answer.
    """
    words, draw, found = tokenizer(), random.Random(seed), []
    shared = "".join(draw.choices(CHARACTERS, k=max(lengths)))
    for length in lengths:
        text, said = shared[: length // 2] + "".join(draw.choices(CHARACTERS, k=length - length // 2)), []
        for _ in range(turns):
            ids = words(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                settings: dict[str, Any] = dict(attention_mask=torch.ones_like(ids), max_new_tokens=tokens)
                if ids.shape[1] > PIECE:  # whole, it would be read as fast and take a gigabyte
                    settings["prefill_chunk_size"] = PIECE
                output = model.generate(ids, **settings, do_sample=False)
            answer = words.decode(output[0, ids.shape[1] :])
            said.append(Turn(text, answer))
            text += answer + "".join(draw.choices(CHARACTERS, k=20))
        found.append(said)
    return found
