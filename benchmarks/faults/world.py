"""A tiny teacher, its text, and the command that a campaign does harm to: in forks, or in fresh processes."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks import forks
from lizard_models.cli.main import main
from lizard_models.files.weights import content_digest

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
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 300  # after which a command hangs
Fault = Callable[[], None]  # what a process does to itself before its command; a fresh one must be able to unpickle it


class Ended(NamedTuple):
    """How a process ended: its exit code, negative for the signal that killed it; what it said; the seconds it took;
    whether processes that it started went on."""

    code: int
    said: str
    seconds: float
    left: bool = False

    @property
    def unclear(self) -> bool:
        """Whether it ended with an error of ours, which keeps its traceback. Ctrl-C before a command has begun is said
        by the command line in one word, or by Python where it still imports."""
        said = self.said.strip()
        if self.code == -signal.SIGINT and said.endswith("\nKeyboardInterrupt"):
            return False
        aborted = said.endswith(("Aborted!", "Aborted."))
        return (self.code == 1 and not aborted) or "Traceback (most recent call last)" in said


@dataclass
class World:
    """A folder with teacher and text, in which each trial has a folder of its own."""

    folder: Path

    fresh: bool = False
    """Whether commands run in processes that import everything themselves, in place of forks of this one."""

    def __post_init__(self) -> None:
        with (self.folder / "said").open("wb") as said:  # in a fork: this process keeps no thread and no random state
            code, _ = forks.end(forks.start(self.make, said.fileno(), self.folder), SECONDS)
        if code:
            raise RuntimeError(f"no teacher could be made: {(self.folder / 'said').read_text()[-2000:]}")
        gc.freeze()

    def make(self) -> None:
        """Writes the teacher and its text."""
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

    def warm(self) -> None:
        """Imports what a run imports, and fills the caches that take it longest, so that forks need not."""
        place, names = self.folder / "warm", self.folder / "imported"
        place.mkdir()
        ended = self.run(self.command(place / "out"), place / "said", partial(_names_at_end, names))
        if ended.code:
            raise RuntimeError(f"a run fails without a fault: {ended.said[-2000:]}")
        for name in names.read_text().splitlines():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
        with contextlib.suppress(ImportError):
            from transformers.conversion_mapping import get_checkpoint_conversion_mapping

            get_checkpoint_conversion_mapping("llama")
        with contextlib.suppress(ImportError):
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure

            figure = Figure()
            figure.suptitle("fonts")
            FigureCanvasAgg(figure).draw()
        gc.freeze()  # what forks share they need not collect, nor copy

    def command(self, out: Path, *more: str) -> list[str]:
        """The command of every trial."""
        data = ["--data", str(self.folder / "texts"), "--eval-data", str(self.folder / "texts")]
        return [
            *("linearize", str(self.folder / "teacher"), *data, *STEPS, *MEASURED, "--device", "cpu"),
            *("--set", "attention.window=16", "--out", str(out), *more),
        ]

    def start(self, arguments: list[str], said: Path, fault: Fault | None = None) -> int:
        """Begins a command in a process of its own, in the folder of ``said``, after ``fault`` is done there.

        Returns its id. It computes in one thread: those of several campaigns would wait for each other.
        """
        work = partial(_exec if self.fresh else _call, arguments, fault)
        with said.open("wb") as output:
            return forks.start(work, output.fileno(), said.parent)

    def run(self, arguments: list[str], said: Path, fault: Fault | None = None, seconds: float = SECONDS) -> Ended:
        """``start``, and ``end``."""
        started = time.monotonic()
        return end(self.start(arguments, said, fault), said, started, seconds)


def end(child: int, said: Path, started: float, seconds: float = SECONDS) -> Ended:
    """Waits for a process of ``World.start``; its code is ``forks.HANGS`` if it takes longer."""
    code, left = forks.end(child, seconds)
    return Ended(code, said.read_text(errors="replace"), time.monotonic() - started, left)


def _call(arguments: list[str], fault: Fault | None) -> None:
    torch.set_num_threads(1)
    sys.argv = ["lizard-attn", *arguments]
    if fault is not None:
        fault()
    main()


def _names_at_end(path: Path) -> None:
    atexit.register(lambda: path.write_text("\n".join(sys.modules)))


def _exec(arguments: list[str], fault: Fault | None) -> None:
    module = ["lizard_models"] if fault is None else ["benchmarks.faults.fresh", pickle.dumps(fault).hex()]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    os.execve(
        sys.executable,
        [sys.executable, "-m", *module, *arguments],
        {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )


def weights(model: Path) -> str:
    """The digest of a saved model's weights."""
    return content_digest(load_file(model / "model.safetensors"), {})
