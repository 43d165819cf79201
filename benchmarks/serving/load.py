"""Many clients at a server that is killed and started again: is anything wrong ever answered?

    python -m benchmarks.serving.load --clients 8 --seconds 60 --kills 2
    python -m benchmarks.serving.load --server vllm --clients 8 --seconds 60 --kills 1 -- --max-model-len 8192

Every client is an ordinary OpenAI client that holds conversations, whose right answers ``generate`` has written before,
in float32. A client that gets an error says so and asks again. What follows -- goes to the server. Ends with 1 where an
answer was wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.serving.process import Server, commands
from benchmarks.serving.tiny import Turn, conversations, save_model

FOUND = re.compile(r"prefix states: (\d+) of (\d+) tokens were read before")


@dataclass
class Tally:
    """What the clients saw, together."""

    right: int = 0
    wrong: list[dict[str, Any]] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    first_token: list[float] = field(default_factory=list)  # seconds
    whole: list[float] = field(default_factory=list)
    by_length: dict[int, list[float]] = field(default_factory=dict)  # seconds to the first token, by first prompt
    lock: threading.Lock = field(default_factory=threading.Lock)


def ask(client: Any, model: str, turn: Turn, tally: Tally, tokens: int, length: int = 0) -> bool:
    """One request, streamed. Whether it was answered. length: of the conversation's first prompt."""
    began, first, parts, ended = time.monotonic(), None, [], False
    try:
        stream = client.completions.create(
            model=model, prompt=turn.prompt, max_tokens=tokens, temperature=0.0, stream=True
        )
        for part in stream:
            for choice in part.choices:
                if choice.text and first is None:
                    first = time.monotonic() - began
                parts.append(choice.text or "")
                ended = ended or choice.finish_reason is not None
        if not ended:
            raise ConnectionError("a stream without an end")
    except Exception as error:  # whatever a client may see of a server that dies
        with tally.lock:
            tally.errors[type(error).__name__] += 1
        return False
    answer = "".join(parts)
    with tally.lock:
        if answer == turn.answer:
            tally.right += 1
        else:
            tally.wrong.append({"prompt": turn.prompt[-80:], "got": answer, "wanted": turn.answer})
        tally.whole.append(time.monotonic() - began)
        tally.first_token.append(first or tally.whole[-1])
        tally.by_length.setdefault(length, []).append(tally.first_token[-1])
    return True


def talk(number: int, url: str, model: str, talks: list[list[Turn]], tally: Tally, end: float, tokens: int) -> None:
    """One client: conversations in an order of its own, until ``end``."""
    import openai

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300)
    draw = random.Random(number)
    while time.monotonic() < end:
        talk = draw.choice(talks)
        for turn in talk:
            while time.monotonic() < end and not ask(client, model, turn, tally, tokens, len(talk[0].prompt)):
                time.sleep(0.3)


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole measurement, as one record."""
    model = save_model(folder / "model", tuple(arguments.kept_layers))
    talks = conversations(model, arguments.lengths, arguments.turns, arguments.tokens)
    extra = list(arguments.extra)
    if arguments.server == "transformers":
        extra += ["--prefix-folder", str(folder / "states")]
    server = Server(commands(arguments.server, folder / "model", extra), folder / "log")
    starts, tally = [server.start()], Tally()
    end = time.monotonic() + arguments.seconds
    url, name = f"http://127.0.0.1:{server.port}/v1", str(folder / "model")
    clients = [
        threading.Thread(target=talk, args=(n, url, name, talks, tally, end, arguments.tokens), daemon=True)
        for n in range(arguments.clients)
    ]
    began = time.monotonic()
    for client in clients:
        client.start()
    try:
        deaths = [began + arguments.seconds * (n + 1) / (arguments.kills + 1) for n in range(arguments.kills)]
        while time.monotonic() < end:
            server.measure()
            if deaths and time.monotonic() >= deaths[0]:
                deaths.pop(0)
                server.kill()
                starts.append(server.start())
            time.sleep(0.1)
        for client in clients:
            client.join(timeout=330)
    finally:
        server.kill()
    seconds = time.monotonic() - began
    up = seconds - sum(starts[1:])
    found = [(int(a), int(b)) for a, b in FOUND.findall((folder / "log").read_text())]
    return {
        "server": arguments.server, "clients": arguments.clients, "lengths": arguments.lengths,
        "turns": arguments.turns,
        "tokens": arguments.tokens, "kept_layers": arguments.kept_layers, "extra": arguments.extra,
        "seconds": round(seconds, 1), "up_s": round(up, 1), "starts_s": [round(s, 1) for s in starts],
        "right": tally.right,
        "wrong": tally.wrong, "errors": dict(tally.errors), "requests_per_up_s": round(tally.right / up, 2),
        "first_token_s": quantiles(tally.first_token), "whole_s": quantiles(tally.whole),
        "by_first_prompt": {
            str(length): {"right": len(times), "first_token_s": quantiles(times)}
            for length, times in sorted(tally.by_length.items())
        },
        "read_before": round(sum(a for a, _ in found) / max(1, sum(b for _, b in found)), 3) if found else None,
        "resident_mib": server.resident >> 20,
    }  # fmt: skip


def quantiles(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile."""
    if len(values) < 2:
        return {}
    return {"median": round(statistics.median(values), 3), "p95": round(statistics.quantiles(values, n=20)[-1], 3)}


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def recorded(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace, Path], dict[str, Any]]
) -> dict[str, Any]:
    """What ``run`` makes of the command line in a folder of its own, printed, and written where --out says.

    What follows -- on the command line is ``extra``, arguments of the server.
    """
    own, extra = sys.argv[1:], []
    if "--" in own:
        own, extra = own[: own.index("--")], own[own.index("--") + 1 :]
    parser.add_argument("--out", type=Path, help="JSON record")
    arguments = parser.parse_args(own)
    arguments.extra = extra
    with tempfile.TemporaryDirectory() as folder:
        record = run(arguments, Path(folder))
    print(json.dumps(record, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", choices=("transformers", "vllm"), default="transformers")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=60, help="bounded: the clients stop by themselves")
    parser.add_argument("--kills", type=int, default=2, help="times the server is killed and started again")
    parser.add_argument("--lengths", type=numbers, default=[200, 500, 1000, 2000], help="tokens of first prompts")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16, help="of each answer")
    parser.add_argument("--kept-layers", type=numbers, default=[], help="layers that stay softmax, e.g. 1,3")
    record = recorded(parser, run)
    if record["wrong"] or not record["right"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
