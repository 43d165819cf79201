"""What a call costs its host beside the arithmetic: Python, operators, kernels to be launched; and ``generate()``.

Counts do not depend on the machine: one that rises is a regression, whatever the noise.
"""

from __future__ import annotations

import cProfile
import pstats
import sys
from collections.abc import Callable
from pathlib import Path
from time import thread_time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_models import LizardConfig, linearize

sys.path.append(str(Path(__file__).parents[1]))  # asv imports this folder alone
from gpu.no_launch import without_kernels  # noqa: E402

MODELS, KINDS = ["teacher", "lizard"], ["prefill", "train", "decode"]
LENGTH, CALLS = 16, 20


def tiny_models() -> dict[str, Any]:
    """A teacher of sizes that cost nothing, and its Lizard."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_hidden_layers=2, **sizes)).eval().requires_grad_(False)
    config = LizardConfig.preset("plain", attention={"window": 8})
    return {"teacher": teacher, "lizard": linearize(teacher, config).eval().requires_grad_(False)}


def layer_call(model: Any, kind: str) -> Callable[[], Any]:
    """A call of the first layer: reading a text, a training step of it, or a decode step."""
    layer, at = model.model.layers[0], torch.arange(LENGTH)[None]
    x, ids = torch.randn(1, LENGTH, 64), torch.zeros(1, LENGTH, dtype=torch.long)
    where: dict[str, Any] = {"position_embeddings": model.model.rotary_emb(x, at), "position_ids": at}
    if kind == "decode":
        x, at = x[:, :1], at[:, -1:] + 1
        where = {"position_embeddings": model.model.rotary_emb(x, at), "position_ids": at}
        with torch.no_grad():
            where["past_key_values"] = model(ids, use_cache=True).past_key_values
    if kind == "train":
        model.requires_grad_(True)
        return lambda: layer(x.detach().requires_grad_(), **where)[0].sum().backward()
    return torch.no_grad()(lambda: layer(x, **where))


class Operators(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


class HostOfALayer:
    """On a CPU, where the Triton path's kernels are left out."""

    params = [MODELS, KINDS]
    param_names = ["model", "kind"]

    def setup(self, model: str, kind: str) -> None:
        self.inside = without_kernels()
        self.launches = self.inside.__enter__()
        self.call = layer_call(tiny_models()[model], kind)
        for _ in range(3):
            self.call()

    def teardown(self, model: str, kind: str) -> None:
        self.inside.__exit__(None, None, None)

    def track_host_time(self, model: str, kind: str) -> float:
        times = []
        for _ in range(CALLS):
            start = thread_time()
            self.call()
            times.append(thread_time() - start)
        return 1e6 * sorted(times)[CALLS // 4]

    def track_operators(self, model: str, kind: str) -> int:
        with Operators() as operators:
            self.call()
        return operators.count

    def track_python_calls(self, model: str, kind: str) -> int:
        profiler = cProfile.Profile()
        profiler.enable()
        self.call()
        profiler.disable()
        stats: Any = pstats.Stats(profiler)
        return sum(n for (file, *_), (_, n, *_) in stats.stats.items() if file != "~")

    def track_triton_launches(self, model: str, kind: str) -> int:
        before = self.launches.count()
        self.call()
        return self.launches.count() - before

    track_host_time.unit = "microseconds"  # type: ignore[attr-defined]
    for counted in (track_operators, track_python_calls, track_triton_launches):
        counted.unit = "calls"  # type: ignore[attr-defined]


class Generate:
    """``generate()`` on a CPU: a token's time must not depend on how long the text was."""

    params = [MODELS, [64, 2048]]
    param_names = ["model", "prompt"]

    def setup(self, model: str, prompt: int) -> None:
        self.model, self.ids = tiny_models()[model], torch.ones(1, prompt, dtype=torch.long)
        self.generate(2)

    def generate(self, tokens: int) -> None:
        self.model.generate(self.ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0)

    def track_token(self, model: str, prompt: int) -> float:
        times = []
        for tokens in (1, 33):
            start = thread_time()
            self.generate(tokens)
            times.append(thread_time() - start)
        return 1e3 * (times[1] - times[0]) / 32

    def track_first_call(self, model: str, prompt: int) -> float:
        fresh = tiny_models()[model]
        start = thread_time()
        fresh.generate(self.ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        return 1e3 * (thread_time() - start)

    track_token.unit = track_first_call.unit = "milliseconds"  # type: ignore[attr-defined]
