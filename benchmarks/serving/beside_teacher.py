"""A Lizard and the teacher that it was made of behind vLLM, one after the other, asked the same by the same clients.

    python -m benchmarks.serving.beside_teacher --clients 16 --requests 64 -- --max-model-len 8192

Random weights, so that the texts mean nothing: requests a second, time to the first token, the servers' processor time,
and how many of the longest texts vLLM says that its cache holds at once. What follows -- goes to both servers.
"""

from __future__ import annotations

import argparse
import itertools
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.serving.load import numbers, quantiles, recorded
from benchmarks.serving.process import Server, commands
from benchmarks.serving.tiny import CHARACTERS, save, save_model, teacher

HELD = re.compile(r"Maximum concurrency for ([\d,]+) tokens per request: ([\d.]+)x")


def ask_all(url: str, model: str, prompts: list[str], clients: int, tokens: int) -> dict[str, Any]:
    """Every prompt once, so many at a time; seconds, and seconds to first tokens."""
    import openai

    places, first, failed = itertools.count(), [], []

    def one() -> None:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
        while (place := next(places)) < len(prompts):
            began, seen = time.monotonic(), None
            asked = dict(model=model, prompt=prompts[place], max_tokens=tokens, temperature=0.0)
            try:
                for part in client.completions.create(**asked, stream=True):
                    if seen is None and any(choice.text for choice in part.choices):
                        seen = time.monotonic() - began
            except openai.OpenAIError as error:
                failed.append(str(error))
            else:
                first.append(seen or time.monotonic() - began)

    threads = [threading.Thread(target=one) for _ in range(clients)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.monotonic() - began
    return {
        "answered": len(first), "failed": failed, "seconds": round(seconds, 2),
        "requests_a_second": round(len(first) / seconds, 2), "first_token_s": quantiles(first),
    }  # fmt: skip


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    save(teacher(), folder / "teacher")
    save_model(folder / "lizard")
    draw = random.Random(0)
    lengths = [arguments.lengths[i % len(arguments.lengths)] for i in range(arguments.requests)]
    prompts = ["".join(draw.choices(CHARACTERS, k=length)) for length in lengths]
    found: dict[str, Any] = {}
    for kind in ("teacher", "lizard"):
        server = Server(commands("vllm", folder / kind, arguments.extra), folder / f"{kind}.log")
        try:
            start, url = server.start(), f"http://127.0.0.1:{server.port}/v1"
            ask_all(url, str(folder / kind), [prompt[::-1] for prompt in prompts[:4]], 4, 4)
            before = server.cpu()
            found[kind] = ask_all(url, str(folder / kind), prompts, arguments.clients, arguments.tokens)
            found[kind]["cpu_s"] = round(server.cpu() - before, 1)
        finally:
            server.kill()
        held = HELD.search((folder / f"{kind}.log").read_text())
        found[kind] |= {"start_s": round(start, 1), "longest_texts_at_once": held and [held[1], float(held[2])]}
    asked = {name: getattr(arguments, name) for name in ("clients", "requests", "lengths", "tokens", "extra")}
    return asked | found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--lengths", type=numbers, default=[200, 1000, 4000], help="tokens of prompts, in turn")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    recorded(parser, run)


if __name__ == "__main__":
    main()
