"""``lizard-attn eval``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors
from lizard_models.cli.options import (
    Cache,
    Device,
    DType,
    Encoding,
    Positions,
    check_folder,
    read_device,
    read_dtype,
    read_numbers,
)


def command(
    model: Annotated[str, typer.Argument(help="Folder of a linearized model, or any causal model for comparison.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Long held-out documents for the loss by position. May be repeated.")
    ] = None,
    lengths: Annotated[str | None, typer.Option(help="Lengths of passkey tests, e.g. 256,1024,4096.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-eval, e.g. piqa,arc_easy.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher to compare with; default: the one the model records; none for no one.")
    ] = None,
    eval_length: Annotated[int, typer.Option(help="Positions of a document.", min=2)] = 4096,
    eval_documents: Annotated[int, typer.Option(help="Documents.", min=1)] = 8,
    trials: Annotated[int, typer.Option(help="Passkeys a length.", min=1)] = 10,
    text_field: Annotated[str | None, typer.Option(help="Field of a record that holds its text.")] = None,
    encoding: Encoding = "utf-8",
    task_files: Annotated[str | None, typer.Option(help="Folder of task files of your own for lm-eval.")] = None,
    num_fewshot: Annotated[int | None, typer.Option(help="Examples before each question.", min=0)] = None,
    limit: Annotated[int | None, typer.Option(help="Documents a task; default all.", min=1)] = None,
    stream: Annotated[
        list[str] | None,
        typer.Option(
            help="Text of any length (.txt, .jsonl, .parquet, .npy of token ids, or a folder), read through in fixed "
            "memory with the loss as it goes. May be repeated.",
        ),
    ] = None,
    stream_chunk: Annotated[int, typer.Option(help="Positions of a stream read at a time.", min=1)] = 2048,
    stream_tokens: Annotated[int | None, typer.Option(help="Positions of a stream; default all.", min=1)] = None,
    positions: Positions = None,
    batch_size: Annotated[int, typer.Option(help="Sequences at a time.", min=1)] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and .png, or stream.json and .png.")
    ] = None,
    device: Device = None,
    dtype: DType = None,
    cache: Cache = None,
) -> None:
    """Measure a model beside its teacher and a window-only control.

    [bold]Examples[/bold]

    Loss by position and passkeys: [cyan]lizard-attn eval my-lizard --data books/ --lengths 256,1024,4096[/cyan]

    Benchmarks (pip install 'lizard-attn[eval]'):
    [cyan]lizard-attn eval my-lizard --tasks piqa,arc_easy,hellaswag,winogrande,mmlu[/cyan]

    A million tokens in fixed memory:
    [cyan]lizard-attn eval my-lizard --stream books/ --stream-tokens 1000000 --out stream[/cyan]

    The teacher alone: [cyan]lizard-attn eval smollm2-135m --teacher none --lengths 1024[/cyan]
    """
    with one_line_errors():
        from rich.console import Console

        console = Console(soft_wrap=True)
        check_folder(out)
        if stream:
            from lizard_models.cli.stream import run_stream

            if data or lengths or tasks:
                raise ValueError("--stream measures one model alone: leave out --data, --lengths and --tasks")
            settings = {
                "chunk": stream_chunk,
                "max_tokens": stream_tokens,
                "text_field": text_field,
                "encoding": encoding,
            }
            run_stream(model, stream, settings, positions, read_device(device), read_dtype(dtype), out, console)
            return

        from lizard_models.evaluation.compare import Comparison, compare
        from lizard_models.evaluation.plot import save_report

        named = [name.strip() for name in (tasks or "").split(",") if name.strip()]
        numbers = read_numbers(lengths, "--lengths")
        if not (data or numbers or named):
            raise ValueError("nothing to measure: give --data, --lengths, --tasks or --stream")
        report = compare(
            Comparison(
                model=model,
                teacher=teacher,
                data=data or [],
                eval_length=eval_length,
                eval_documents=eval_documents,
                text_field=text_field,
                encoding=encoding,
                passkey_lengths=numbers,
                passkey_trials=trials,
                tasks=named,
                task_files=task_files,
                num_fewshot=num_fewshot,
                limit=limit,
                batch_size=batch_size,
                positions=positions,
                device=read_device(device),
                dtype=read_dtype(dtype),
                cache=cache,
            ),
            console,
        )
        for table in report.tables():
            console.print(table)
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            console.print("saved: " + ", ".join(str(path) for path in save_report(report, out, say=console.print)))
