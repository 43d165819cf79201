"""``lizard-attn eval --stream``: the loss of a text of any length, line by line as it is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    import torch

    from lizard_models.evaluation.stream import Sample, StreamMeter

LINE_SECONDS = 30.0  # a line at least this often; one too at the end of every bucket


def run_stream(
    name: str,
    sources: list[str],
    settings: dict[str, Any],
    positions: str | None,
    device: str,
    dtype: torch.dtype | None,
    out: Path | None,
    console: Console,
) -> None:
    """Streams ``sources`` through a model, prints and saves what ``measure_stream`` finds.

    settings: chunk, max_tokens, text_field and encoding. Raises ValueError for a model or text that is not there.
    """
    from lizard_models.evaluation.plot import save_stream
    from lizard_models.evaluation.stream import measure_stream
    from lizard_models.teachers.loading import load_model
    from lizard_models.text.token_stream import count_tokens, stream_tokens

    loaded = load_model(name, device=device, dtype=dtype, positions=positions)
    total = count_tokens(sources)
    limits = [n for n in (None if total is None else total - 1, settings["max_tokens"]) if n is not None]
    tokens = stream_tokens(
        sources,
        loaded.tokenizer,
        vocab_size=loaded.model.config.vocab_size,
        text_field=settings["text_field"],
        encoding=settings["encoding"],
    )
    record = {
        "model": name,
        "sources": sources,
        **settings,
        "positions": positions,
        "lizard": getattr(loaded.model.config, "lizard", None),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "device": device,
    }
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    lines = _Lines(console, min(limits, default=None))
    with console.status("reading the first chunk") as status:
        report = measure_stream(
            loaded.model,
            tokens,
            title=f"stream through {name}",
            chunk=settings["chunk"],
            max_tokens=settings["max_tokens"],
            settings=record,
            show=lambda meter, sample: status.update(lines.take(meter, sample)),
        )
    console.print(report.table())
    if out is not None:
        console.print("saved: " + ", ".join(str(path) for path in save_stream(report, out, say=console.print)))


class _Lines:
    """A line for every bucket that is full and every half minute, a status in between."""

    def __init__(self, console: Console, total: int | None) -> None:
        self.console, self.total = console, total
        self.buckets, self.printed = 0, 0.0
        console.print("     tokens  bucket            loss  tokens/s  resident MiB  CUDA MiB", highlight=False)

    def take(self, meter: StreamMeter, sample: Sample) -> str:
        """The new status."""
        from lizard_models.evaluation.report import short

        loss = meter.losses()
        full = len(loss.means) - 1
        cuda = f"{sample.cuda / 2**20:,.1f}" if sample.cuda else "-"
        rate = f"{sample.tokens / max(sample.seconds, 1e-9):,.0f}"
        for bucket in sorted({*range(self.buckets, full)} | ({full} if self._late(sample) else set())):
            where = f"{short(loss.edges[bucket])}–{short(loss.edges[bucket + 1])}"
            self.console.print(
                f"{sample.tokens:>11,}  {where:<14}  {loss.means[bucket]:.4f}  {rate:>8}  "
                f"{sample.resident / 2**20:>12,.1f}  {cuda:>8}",
                highlight=False,
            )
            self.printed = sample.seconds
        self.buckets = full
        of = "" if self.total is None else f" of {self.total:,}"
        return f"{sample.tokens:,}{of} positions, loss {loss.means[-1]:.3f}, {rate} tokens/s"

    def _late(self, sample: Sample) -> bool:
        return sample.seconds - self.printed >= LINE_SECONDS
