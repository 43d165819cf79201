"""Each token's time in ``generate()``, of texts of several lengths in turn, and what the chip did meanwhile.

A token is a few milliseconds and a call of ``generate()`` tens of them, more on a busy host, so that the difference of
a long call and a short one says nothing below a tenth. Here a token is timed by itself, from one call of the logits
processors to the next: between two of them ``generate()`` waits once for the device. The first ``WARM`` tokens of each
call do not count. Lengths take turns, forwards and then backwards, so that a chip or a host that becomes slower does so
for all of them; what is left is the length's.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from lizard_models.model import decode_graph

WARM = 4
REPLAYS = 20  # of a captured step alone, in each of three turns
FIELDS = {
    "sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "watts": "power.draw", "celsius": "temperature.gpu",
    "reasons": "clocks_event_reasons.active",
}  # fmt: skip
REASONS = {  # why clocks are below the most, bits of NVML's nvmlClocksEventReasons
    0x1: "idle", 0x2: "set by applications", 0x4: "power cap", 0x8: "hardware slowdown", 0x10: "boost of a group",
    0x20: "thermal", 0x40: "hardware thermal", 0x80: "power brake", 0x100: "display",
}  # fmt: skip


class Chip:
    """What ``nvidia-smi`` says of the GPU while a call runs: asked when it is made, read when it is over."""

    def __init__(self) -> None:
        device = torch.cuda.get_device_properties(torch.cuda.current_device())
        query = ",".join(FIELDS.values())
        command = ["nvidia-smi", "-i", f"GPU-{device.uuid}", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def read(self) -> dict[str, Any]:
        """Numbers by the names of ``FIELDS``, the reasons in words; {"failed": what it said} where it has none."""
        said = self.process.communicate()[0].strip()
        if self.process.returncode:
            return {"failed": said}
        return parsed(said)


def parsed(line: str) -> dict[str, Any]:
    """A line of ``nvidia-smi`` with the values of ``FIELDS``; None for what it does not know."""
    *numbers, reasons = (text.strip() for text in line.split(","))
    found: dict[str, Any] = dict.fromkeys(FIELDS)
    for name, text in zip(FIELDS, numbers, strict=False):
        found[name] = float(text) if text.replace(".", "", 1).isdigit() else None
    bits = int(reasons, 16) if reasons.startswith("0x") else 0
    return found | {"reasons": [words for bit, words in REASONS.items() if bits & bit]}


class TokenClock(LogitsProcessor):
    """Notes when each token's logits have been asked for; changes none. watch: asked as soon as tokens count."""

    def __init__(self, watch: Any = None) -> None:
        self.stamps: list[float] = []
        self.watch, self.seen = watch, None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.watch is not None and len(self.stamps) == WARM - 1:
            self.seen = self.watch()
        self.stamps.append(time.perf_counter())
        return scores

    def seconds(self) -> list[float]:
        """Of each token that counts."""
        return [b - a for a, b in zip(self.stamps[WARM:], self.stamps[WARM + 1 :], strict=False)]


class Writer:
    """A batch that ``generate()`` goes on with. cache: what holds ids [B, n] but their last column."""

    def __init__(self, model: Any, cache: Any, ids: Tensor) -> None:
        self.model, self.cache, self.ids = model, cache, ids
        self.times: list[list[float]] = []  # of each turn, a token
        self.beside: list[float] = []  # what each call took beside its tokens
        self.chip: list[dict[str, Any]] = []
        self.replays: list[float] = []

    def call(self, tokens: int, clock: TokenClock | None = None) -> float:
        """Seconds of a call."""
        start = now(self.ids)
        self.ids = self.model.generate(
            self.ids, past_key_values=self.cache, max_new_tokens=tokens, do_sample=False, pad_token_id=0,
            logits_processor=LogitsProcessorList([] if clock is None else [clock]),
        )  # fmt: skip
        return now(self.ids) - start

    def turn(self, tokens: int) -> None:
        """So many tokens that count."""
        clock, calls = TokenClock(Chip if self.ids.is_cuda else None), tokens + WARM + 1
        whole = self.call(calls, clock)
        if clock.seen is not None:
            self.chip.append(clock.seen.read())
        self.times.append(clock.seconds())
        self.beside.append(whole - calls * statistics.median(self.times[-1]))

    def replay(self) -> None:
        """The captured step alone, by events, which has nothing of the text's length in it; the last to be asked."""
        captured = decode_graph._graphs.get(self.cache) if self.ids.is_cuda else None
        if captured is None:
            return
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPLAYS):
            captured.replay()
        end.record()
        torch.cuda.synchronize()
        self.replays.append(start.elapsed_time(end) / REPLAYS)

    def row(self) -> dict[str, Any]:
        """What was measured, of all turns."""
        seconds = sorted(sum(self.times, []))
        token = statistics.median(seconds)
        found: dict[str, Any] = {
            "ms_token": 1e3 * token,
            "tokens_s": len(self.ids) / token,
            "turns_ms": [1e3 * statistics.median(times) for times in self.times],
            "quartiles_ms": [1e3 * seconds[len(seconds) // 4], 1e3 * seconds[3 * len(seconds) // 4]],
            "call_ms": 1e3 * statistics.median(self.beside),
        }
        found |= {"replay_ms": statistics.median(self.replays)} if self.replays else {}
        return found | ({"chip": self.chip} if self.chip else {})


def now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(writers: Sequence[Writer], turns: int, tokens: int) -> None:
    """``tokens`` of each, ``turns`` times: forwards, then backwards, and so on; then their replays."""
    for turn in range(turns):
        for writer in writers if turn % 2 == 0 else reversed(writers):
            writer.turn(tokens)
    for _ in range(3):
        for writer in writers:
            writer.replay()


def flatness(rows: Sequence[dict[str, Any]]) -> str:
    """Slowest over fastest length, by the token and by the replay alone, beside what turns of one length differ by and
    the clocks: a ratio within the turns' is no growth, one that replays or clocks have too is not the length's."""
    rows = [row for row in rows if "turns_ms" in row]
    if len(rows) < 2:
        return ""
    token, replay = ([row[name] for row in rows if name in row] for name in ("ms_token", "replay_ms"))
    noise = max(max(row["turns_ms"]) / min(row["turns_ms"]) for row in rows)
    text = f"slowest over fastest length {max(token) / min(token):.3f}; turns of one length {noise:.3f}"
    text += f"; replays alone {max(replay) / min(replay):.3f}" if len(replay) == len(rows) else ""
    chips = [chip for row in rows for chip in row.get("chip", [])]
    clocks = [chip["sm_mhz"] for chip in chips if chip.get("sm_mhz")]
    if clocks:
        reasons = sorted({reason for chip in chips for reason in chip.get("reasons", [])})
        text += f"; SM clock {min(clocks):.0f} to {max(clocks):.0f} MHz ({', '.join(reasons) or 'nothing holds it'})"
    failed = {chip["failed"] for chip in chips if "failed" in chip}
    return text + "".join(f"; nvidia-smi: {words}" for words in sorted(failed))
