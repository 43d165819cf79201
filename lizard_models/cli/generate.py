"""``lizard-attn generate``."""

from __future__ import annotations

from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors
from lizard_models.cli.options import Device, DType, read_device, read_dtype

PREFILL_CHUNK = 4096  # tokens of the prompt that are read at a time, so that its length takes no memory


def command(
    model: Annotated[str, typer.Argument(help="Folder of a linearized model.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to write.", min=1)] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.", min=0.0)] = 0.0,
    top_p: Annotated[float, typer.Option(help="Share of the probability that is sampled from.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    device: Device = None,
    dtype: DType = None,
) -> None:
    """Continue a text in constant memory, however long it gets.

    [bold]Examples[/bold]

    [cyan]lizard-attn generate my-lizard "Once upon a time"[/cyan]

    A question: [cyan]lizard-attn generate my-lizard --chat "Who wrote Hamlet?"[/cyan]

    A whole book as the prompt, sampled: [cyan]lizard-attn generate my-lizard - --temperature 0.8 < book.txt[/cyan]
    """
    with one_line_errors():
        import sys
        import time

        import torch
        from rich.console import Console
        from transformers import TextStreamer

        from lizard_models.loading import load_model

        loaded = load_model(model, device=read_device(device), dtype=read_dtype(dtype))
        if loaded.tokenizer is None:
            raise ValueError(f"model {model!r} has no tokenizer: copy the teacher's tokenizer files into it")
        text = sys.stdin.read() if prompt == "-" else prompt
        if chat:
            turns = [{"role": "user", "content": text}]
            text = loaded.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        inputs = loaded.tokenizer(text, return_tensors="pt", add_special_tokens=not chat, verbose=False)
        if inputs["input_ids"].shape[1] == 0:
            raise ValueError("prompt is empty: give some text to continue")
        torch.manual_seed(seed)
        started = time.monotonic()
        output = loaded.model.generate(
            **{name: tensor.to(loaded.model.device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            pad_token_id=loaded.tokenizer.pad_token_id or loaded.tokenizer.eos_token_id,
            streamer=TextStreamer(loaded.tokenizer, skip_prompt=chat, skip_special_tokens=True),
            return_dict_in_generate=True,
            prefill_chunk_size=PREFILL_CHUNK,
            **(
                {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature else {"do_sample": False}
            ),
        )
        seconds = time.monotonic() - started
        written = output.sequences.shape[1] - inputs["input_ids"].shape[1]
        cache = output.past_key_values
        held = f", {cache.state_bytes() / 1e6:.1f} MB of state" if hasattr(cache, "state_bytes") else ""
        Console(stderr=True, highlight=False).print(
            f"{inputs['input_ids'].shape[1]} tokens read, {written} written in {seconds:.1f} s{held}"
        )
