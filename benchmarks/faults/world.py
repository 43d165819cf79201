"""A tiny teacher, its text, and the command that a campaign does harm to, run in forked processes."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lizard_models.cli.main import app
from lizard_models.files.weights import content_digest
from lizard_models.runs import linearize_run, work

LOADED = (linearize_run, work)  # here, so that no trial loads them anew
with contextlib.suppress(ImportError):
    import matplotlib.backends.backend_agg
    import matplotlib.backends.backend_svg
    import matplotlib.figure  # noqa: F401

SENTENCE = "the wind turns the mill and the river runs down to the sea, year {n} after year. "
STEPS = [
    "--preset",
    "plain",
    "--stage1-steps",
    "4",
    "--stage2-steps",
    "4",
    "--save-steps",
    "2",
    "--seq-len",
    "64",
    "--batch-size",
    "2",
]
MEASURED = ["--eval-length", "120", "--eval-documents", "1"]


class Ended(NamedTuple):
    """How a process ended: its exit code, negative for the signal that killed it; what it said; the seconds it took."""

    code: int
    said: str
    seconds: float

    @property
    def unclear(self) -> bool:
        """Whether it ended with an error of ours, which keeps its traceback."""
        return self.code == 1 or "Traceback (most recent call last)" in self.said


@dataclass
class World:
    """A folder with teacher and text, in which each trial has a folder of its own."""

    folder: Path

    def __post_init__(self) -> None:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(vocabulary), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.3,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        LlamaForCausalLM(config).save_pretrained(self.folder / "teacher")
        fast.save_pretrained(self.folder / "teacher")
        (self.folder / "texts").mkdir()
        for n in range(3):
            (self.folder / "texts" / f"{n}.txt").write_text(SENTENCE.format(n=n) * 30)
        gc.freeze()  # what forks share they need not collect, nor copy

    def command(self, out: Path, *more: str) -> list[str]:
        """The command of every trial."""
        data = ["--data", str(self.folder / "texts"), "--eval-data", str(self.folder / "texts")]
        return [
            *("linearize", str(self.folder / "teacher"), *data, *STEPS, *MEASURED, "--device", "cpu"),
            *("--set", "attention.window=16", "--out", str(out), *more),
        ]


def start(arguments: list[str], said: Path, fault: Callable[[], None] = lambda: None) -> int:
    """Begins a command in a forked process, after ``fault`` is done there. Returns its id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        written = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(written, 1)
        os.dup2(written, 2)
        sys.argv = ["lizard-attn", *arguments]
        fault()
        try:
            app(arguments)
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:  # what a command does not expect
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def end(child: int, said: Path, started: float) -> Ended:
    """Waits for a process of ``start``."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(code, said.read_text(errors="replace"), time.monotonic() - started)


def run(arguments: list[str], said: Path, fault: Callable[[], None] = lambda: None) -> Ended:
    """Both."""
    started = time.monotonic()
    return end(start(arguments, said, fault), said, started)


def weights(model: Path) -> str:
    """The digest of a saved model's weights."""
    return content_digest(load_file(model / "model.safetensors"), {})
