"""``lizard-attn generate``."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors
from lizard_models.cli.options import Device, DType, Encoding, Positions, read_device, read_dtype

LEAST_TEMPERATURE = 1e-4  # by which logits are divided; less is the likeliest token, and then an overflow


def command(
    model: Annotated[str, typer.Argument(help="Folder of a linearized model.")],
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue; - reads it from standard input.", show_default=False)
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(help="Text file to continue, of any length; only what is written after it is printed."),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", help="Tokens to write.", min=0, max=1 << 40)
    ] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability that is sampled from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.", min=0, max=(1 << 63) - 1)] = 0,
    encoding: Encoding = "utf-8",
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    save_state: Annotated[
        Path | None, typer.Option(help="File for what the model remembers of the prompt; -n 0 writes no text.")
    ] = None,
    load_state: Annotated[
        Path | None, typer.Option(help="File of --save-state: the prompt goes on from the text read there.")
    ] = None,
    positions: Positions = None,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Continue a text in constant memory, however long it gets.

    [bold]Examples[/bold]

    [cyan]lizard-attn generate my-lizard "Once upon a time"[/cyan]

    A question: [cyan]lizard-attn generate my-lizard --chat "Who wrote Hamlet?"[/cyan]

    A whole book as the prompt, sampled:
    [cyan]lizard-attn generate my-lizard --prompt-file book.txt --temperature 0.8[/cyan]

    A long text read once, and asked many times:
    [cyan]lizard-attn generate my-lizard --prompt-file book.txt -n 0 --save-state book.state[/cyan]
    [cyan]lizard-attn generate my-lizard --load-state book.state " The moral of this is"[/cyan]

    The same from a pipe, printed as it is read: [cyan]lizard-attn generate my-lizard - < book.txt[/cyan]
    """
    with one_line_errors():
        import time

        import torch
        from rich.console import Console

        from lizard_models.model import state_file
        from lizard_models.model.cache_name import CACHE
        from lizard_models.teachers.loading import load_model
        from lizard_models.text import prompts
        from lizard_models.text.decoding import check_encoding

        if (prompt is None) == (prompt_file is None):
            raise ValueError("give one of PROMPT and --prompt-file")
        if not 0 < top_p <= 1:
            raise ValueError(f"--top-p is {top_p}, wanted a share above 0, up to 1")
        if temperature and not (math.isfinite(temperature) and temperature >= LEAST_TEMPERATURE):
            raise ValueError(f"--temperature is {temperature}, wanted 0, or {LEAST_TEMPERATURE} and more")
        if not max_new_tokens and save_state is None:
            raise ValueError("--max-new-tokens 0 writes nothing: give --save-state with it, or at least 1")
        if save_state is not None:
            state_file.place_for(save_state)  # before a long text is read
        loaded = load_model(model, device=read_device(device), dtype=read_dtype(dtype), positions=positions)
        if loaded.tokenizer is None:
            raise ValueError(f"model {model!r} has no tokenizer: copy the teacher's tokenizer files into it")
        torch.manual_seed(seed)
        started = time.monotonic()
        text = _text(prompt, prompt_file, check_encoding(encoding), echo=not chat and prompt_file is None)
        tokens = prompts.prompt_tokens(text, loaded.tokenizer, chat, goes_on=load_state is not None)
        cache = None if load_state is None else state_file.load_state(load_state, loaded.model)
        before = 0 if cache is None else cache.get_seq_length()
        prefilled = prompts.prefill(loaded.model, tokens, prompts.PREFILL_CHUNK, cache)
        report = Console(stderr=True, highlight=False, soft_wrap=True)
        if save_state is not None:
            size = state_file.save_state(save_state, loaded.model, prompts.read_to_the_end(loaded.model, prefilled))
            report.print(f"{prefilled.length} tokens read, state saved: {save_state} ({size / 1e6:.1f} MB)")
        if not max_new_tokens:
            return
        output = loaded.model.generate(
            **prefilled.generate_inputs(),
            max_new_tokens=max_new_tokens,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
            streamer=prompts.ContinuationStreamer(loaded.tokenizer, skip_special_tokens=True),
            return_dict_in_generate=True,
            **(
                {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
            ),
        )
        seconds = time.monotonic() - started
        written = output.sequences.shape[1] - 1
        cache = output[CACHE]
        held = f", {cache.state_bytes() / 1e6:.1f} MB of state" if hasattr(cache, "state_bytes") else ""
        report.print(f"{prefilled.length - before} tokens read, {written} written in {seconds:.1f} s{held}")


def _text(prompt: str | None, file: Path | None, encoding: str, echo: bool) -> Iterator[str]:
    """The prompt in pieces, printed as they are read if ``echo``."""
    from lizard_models.files.sources import expanded
    from lizard_models.text.decoding import argument_text, stream_text, text_pieces

    def pieces() -> Iterator[str]:
        if file is not None:
            yield from text_pieces(expanded(file, "prompt_file"), encoding, argument="prompt_file")
        elif prompt == "-":
            yield from stream_text(sys.stdin, encoding)
        elif prompt:
            yield argument_text(prompt, "prompt")

    for piece in pieces():
        if echo:
            print(piece, end="", flush=True)
        yield piece
