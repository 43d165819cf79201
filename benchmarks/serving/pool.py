"""Continuous batching over a pool of states, without an engine: how many texts, how fast, beside a teacher's pages.

    python -m benchmarks.serving.pool --shape llama-3-8b --device cuda --together 64 512 --out pool.json
    python -m benchmarks.serving.pool --shape tiny --together 4 --requests 8 --prompts 5 60 --answers 3 12 --chunk 16

Random weights in the shape of a model. Requests of mixed lengths arrive, a page becomes free, their prompts are read in
pieces of ``--chunk`` tokens beside the texts that write, one token each a step, until their answers are done. On a GPU
the step of the writing ones is replayed from a CUDA graph, one for each power of two of texts; rows without one are
nobody's. Every step's tokens are read back before the next, as a server that streams does. Nothing is sampled.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lizard_models import LizardConfig, StatePool, linearize

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    ),
    "llama-3-8b": dict(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False,
    ),
}  # fmt: skip
BLOCK = 16  # tokens of a page of the teacher's keys and values, as vLLM has it
GIB = 1 << 30


@dataclass(eq=False)
class Text:
    """A request: what is read, how much is written, and when."""

    prompt: Tensor  # [T], on the host
    answer: int  # tokens
    arrives: float  # seconds
    read: int = 0
    page: int = -1
    written: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)  # of each written token


def build(shape: str, device: str, dtype: torch.dtype, window: int, preset: str = "plain") -> Any:
    """A random Lizard and nothing else on the device. Scores that nobody fitted keep as many keys as fitted ones."""
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072, eos_token_id=None)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            teacher = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model = linearize(teacher, LizardConfig.preset(preset, attention={"window": window}))
    return model.to(device).eval().requires_grad_(False)


def requests(
    count: int, prompts: tuple[int, int], answers: tuple[int, int], rate: float, vocabulary: int
) -> list[Text]:
    """Prompts of log-uniform and answers of uniform lengths, arriving at ``rate`` a second, or all at once (0)."""
    draw, at = random.Random(0), 0.0
    ids = torch.Generator().manual_seed(0)
    texts = []
    for _ in range(count):
        length = round(math.exp(draw.uniform(math.log(prompts[0]), math.log(prompts[1]))))
        at += draw.expovariate(rate) if rate else 0.0
        prompt = torch.randint(0, vocabulary, (length,), generator=ids)
        texts.append(Text(prompt, draw.randint(*answers), at))
    return texts


class Steps:
    """The decode step of up to ``most`` texts: their newest tokens and pages in, their next tokens out."""

    def __init__(self, pool: StatePool, most: int) -> None:
        self.pool, self.device = pool, pool.memory[0].device
        self.sizes = [1 << n for n in range(most.bit_length())]
        self.sizes += [] if self.sizes[-1] == most else [most]
        self.graphs: dict[int, tuple[Tensor, Callable[[], Any], Tensor]] = {}
        if self.device.type == "cuda":
            self.memory = torch.cuda.graph_pool_handle()  # of all graphs, of which one runs at a time
            for size in reversed(self.sizes):
                self.graphs[size] = self._capture(size)

    def next_tokens(self, texts: list[Text]) -> list[int]:
        """One token of each."""
        size = next(n for n in self.sizes if n >= len(texts))
        rows = [[text.written[-1], text.page] for text in texts] + [[0, -1]] * (size - len(texts))
        given = torch.tensor(rows)
        if size not in self.graphs:
            return self._step(given.to(self.device))[: len(texts)].tolist()
        inputs, replay, found = self.graphs[size]
        inputs.copy_(given)
        replay()
        return found[: len(texts)].tolist()

    def _step(self, rows: Tensor) -> Tensor:
        return self.pool.read(rows[:, :1], rows[:, 1], furthest=1).argmax(-1)  # none is past the limit: ``measure``

    def _capture(self, size: int) -> tuple[Tensor, Callable[[], Any], Tensor]:
        inputs = torch.tensor([[0, -1]] * size, device=self.device)
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._step(inputs)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, stream=stream):
            found = self._step(inputs)
        return inputs, graph.replay, found


class Engine:
    """Texts wait, are read in pieces, write, and leave their page to the next."""

    def __init__(self, model: Any, together: int, chunk: int) -> None:
        self.pool = StatePool(model, together)
        self.steps, self.chunk = Steps(self.pool, together), chunk
        self.free = list(range(together))
        self.waiting: deque[Text] = deque()
        self.reading: deque[Text] = deque()
        self.writing: list[Text] = []
        self.most = 0  # texts that had a page at once

    def step(self, now: Callable[[], float]) -> None:
        """A piece of one prompt, and a token of every text that writes."""
        while self.waiting and self.free:
            self.waiting[0].page = self.free.pop()
            self.reading.append(self.waiting.popleft())
        self.most = max(self.most, len(self.reading) + len(self.writing))
        if self.writing:
            tokens, at = self.steps.next_tokens(self.writing), now()
            for text, token in zip(self.writing, tokens, strict=True):
                text.written.append(token)
                text.times.append(at)
        if self.reading:
            text = self.reading[0]
            first = self._read(text)
            if first is not None:
                self.reading.popleft()
                self.writing.append(text)
                text.written.append(first)
                text.times.append(now())
        if done := [text for text in self.writing if len(text.written) == text.answer]:
            self.writing = [text for text in self.writing if len(text.written) < text.answer]
            self.free += [text.page for text in done]

    def _read(self, text: Text) -> int | None:
        device = self.steps.device
        part = text.prompt[text.read : text.read + self.chunk].to(device)[None]
        page, has = torch.tensor([text.page], device=device), torch.tensor([text.read > 0], device=device)
        text.read += part.shape[1]
        logits = self.pool.read(part, page, has, furthest=text.read)
        return int(logits.argmax()) if text.read == len(text.prompt) else None

    def serve(self, texts: list[Text]) -> float:
        """All of them; seconds."""
        coming = deque(sorted(texts, key=lambda text: text.arrives))
        began = time.perf_counter()

        def now() -> float:
            return time.perf_counter() - began

        while coming or self.waiting or self.reading or self.writing:
            while coming and coming[0].arrives <= now():
                self.waiting.append(coming.popleft())
            if not (self.waiting or self.reading or self.writing):
                time.sleep(max(0.0, coming[0].arrives - now()))
            self.step(now)
        return now()


def teacher_bytes(config: Any, tokens: int, itemsize: int) -> int:
    """Of the keys and values of a teacher's text, in whole pages: by formula, nothing is run."""
    pages = -(-tokens // BLOCK)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * itemsize * pages * BLOCK


def summary(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds."""
    ranked = sorted(values)
    return {
        "median_ms": round(1e3 * statistics.median(ranked), 2),
        "p95_ms": round(1e3 * ranked[min(len(ranked) - 1, int(0.95 * len(ranked)))], 2),
    }


def measure(model: Any, together: int, arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Text]]:
    """The record of one number of texts at once, and what they wrote."""
    engine = Engine(model, together, arguments.chunk)
    count = arguments.requests or 2 * together
    texts = requests(count, arguments.prompts, arguments.answers, arguments.rate, model.config.vocab_size)
    limit = model.model.position_range.limit
    if max(len(text.prompt) + text.answer for text in texts) > limit:
        raise ValueError(
            f"--prompts: got {arguments.prompts}, wanted texts of {limit} tokens or fewer, as the context has"
        )
    for length in (arguments.chunk, arguments.chunk + 37, 48, 5, 1):  # kernels are compiled by what divides their sizes
        engine.serve([Text(torch.zeros(length, dtype=torch.int64), 2, 0.0)])
    engine.most = 0
    seconds = engine.serve(texts)
    gaps = [b - a for text in texts for a, b in zip(text.times, text.times[1:], strict=False)]
    lengths = [len(text.prompt) + text.answer for text in texts]
    itemsize = model.dtype.itemsize
    written = sum(len(text.written) for text in texts)
    teacher = [teacher_bytes(model.config, length, itemsize) for length in lengths]
    record = {
        "together": together, "requests": count, "at_once": engine.most, "seconds": round(seconds, 3),
        "requests_a_second": round(count / seconds, 3), "written_a_second": round(written / seconds, 1),
        "read_a_second": round(sum(len(text.prompt) for text in texts) / seconds, 1),
        "mean_prompt": round(statistics.mean(len(text.prompt) for text in texts), 1),
        "longest_prompt": max(len(text.prompt) for text in texts),
        "first_token": summary([text.times[0] - text.arrives for text in texts]), "between_tokens": summary(gaps),
        "peak_gib": round(torch.cuda.max_memory_allocated() / GIB, 2) if model.device.type == "cuda" else None,
        "page_bytes": engine.pool.page_bytes, "texts_a_gib": round(GIB / engine.pool.page_bytes, 2),
        "teacher_texts_a_gib": round(GIB / statistics.mean(teacher), 2),
        "teacher_texts_a_gib_longest": round(GIB / max(teacher), 2),
        "teacher_texts_a_gib_64k": round(GIB / teacher_bytes(model.config, 65536, itemsize), 3),
    }  # fmt: skip
    return record, texts


def table(records: list[dict[str, Any]]) -> str:
    """Short, in Markdown."""
    names = {
        "at_once": "texts at once", "requests_a_second": "requests/s", "written_a_second": "tokens/s",
        "texts_a_gib": "texts a GiB", "teacher_texts_a_gib": "teacher's, these lengths",
        "teacher_texts_a_gib_64k": "teacher's, 64K tokens",
    }  # fmt: skip
    head = [*names.values(), "first token, median and 95%", "between tokens"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for record in records:
        times = [f"{x['median_ms']}, {x['p95_ms']} ms" for x in (record["first_token"], record["between_tokens"])]
        lines.append("| " + " | ".join([*(str(record[name]) for name in names), *times]) + " |")
    return "\n".join(lines)


def main(given: list[str] | None = None) -> tuple[list[dict[str, Any]], list[list[Text]], Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default=None, choices=("float32", "bfloat16"), help="bfloat16 on a GPU")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--preset", choices=("plain", "recommended"), default="plain", help="recommended keeps keys")
    parser.add_argument("--together", type=int, nargs="+", default=[64, 512], help="pages: texts at once")
    parser.add_argument("--requests", type=int, help="twice as many as texts at once by default")
    parser.add_argument("--prompts", type=int, nargs=2, default=(128, 4096), help="shortest and longest, log-uniform")
    parser.add_argument("--answers", type=int, nargs=2, default=(64, 256), help="shortest and longest, uniform")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of a prompt read between two steps")
    parser.add_argument("--rate", type=float, default=0.0, help="arrivals a second; 0: all are there at the start")
    parser.add_argument("--out", type=Path, help="JSON record")
    arguments = parser.parse_args(given)
    name = arguments.dtype or ("bfloat16" if arguments.device.startswith("cuda") else "float32")
    model = build(arguments.shape, arguments.device, getattr(torch, name), arguments.window, arguments.preset)
    records, written = [], []
    for together in arguments.together:
        record, texts = measure(model, together, arguments)
        print(json.dumps(record), flush=True)
        records.append(record)
        written.append(texts)
    print(table(records))
    if arguments.out is not None:
        device = torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "CPU"
        whole = {"device": device, "torch": torch.__version__, "shape": arguments.shape, "dtype": name}
        whole |= {"preset": arguments.preset, "chunk": arguments.chunk, "rate": arguments.rate, "runs": records}
        arguments.out.write_text(json.dumps(whole, indent=1) + "\n")
    return records, written, model


if __name__ == "__main__":
    main()
