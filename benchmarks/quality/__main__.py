"""``python -m benchmarks.quality``: the rows behind docs/results.md and docs/diary.md."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from benchmarks.quality import more_commands
from benchmarks.quality.options import (
    RESULTS,
    BudgetName,
    Out,
    given,
    read_budget,
    read_names,
    read_seeds,
    read_tokenizer,
    recorded_lm,
)
from benchmarks.quality.shown import COMMANDS
from lizard_models.cli.errors import Command, one_line_errors
from lizard_models.cli.options import Cache, Device, read_device, read_numbers

app = typer.Typer(
    help="Quality: every preset and ablation, trained and measured alike. One record a row, one command a table.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Teacher = Annotated[str, typer.Option(help="Hub name, local folder, or smollm2-135m.")]
Data = Annotated[list[str] | None, typer.Option(help="Training text or token ids. May be repeated.")]
EvalData = Annotated[list[str] | None, typer.Option(help="Held-out documents. May be repeated.")]


@app.command("run", cls=Command)
def run(
    names: Annotated[list[str], typer.Argument(help="Tables or rows, see `python -m benchmarks.quality list`.")],
    data: Data = None,
    eval_data: EvalData = None,
    budget: BudgetName = "quick",
    stage0_steps: Annotated[
        int | None, typer.Option(help="Instead of the budget's, of rows with kept keys.", min=0)
    ] = None,
    stage1_steps: Annotated[int | None, typer.Option(help="Instead of the budget's.", min=0)] = None,
    stage2_steps: Annotated[int | None, typer.Option(help="Instead of the budget's.", min=0)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Instead of the budget's.", min=1)] = None,
    seq_len: Annotated[int | None, typer.Option(help="Instead of the budget's.", min=2)] = None,
    measures: Annotated[
        str,
        typer.Option(
            help="Of loss, kl, branches, restore, length, source, passkey, passkeys5, found, ruler, lines, tasks."
        ),
    ] = "loss,kl,branches",
    seeds: Annotated[str, typer.Option(help="Seeds, each a row of its own, e.g. 0,1,2.")] = "0",
    controls: Annotated[bool, typer.Option(help="The teacher and window control that each row needs, too.")] = True,
    minutes: Annotated[float | None, typer.Option(help="Start no row that would not end in this time.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs to use; default all there are.", min=0)] = None,
    jobs_per_gpu: Annotated[int, typer.Option(help="Rows side by side on each GPU (or on the CPU).", min=1)] = 1,
    eval_length: Annotated[int, typer.Option(help="Positions of an evaluation document.", min=2)] = 4096,
    eval_documents: Annotated[int, typer.Option(help="Evaluation documents.", min=1)] = 8,
    long_length: Annotated[int, typer.Option(help="Positions for the measures length and source.", min=2)] = 65_536,
    passkey_lengths: Annotated[str, typer.Option(help="Lengths of the passkey tests.")] = (
        "256,512,1024,2048,4096,8192,16384"
    ),
    passkey_trials: Annotated[int, typer.Option(help="Passkeys a length.", min=1)] = 20,
    found_lengths: Annotated[str, typer.Option(help="Lengths of the measure found.")] = "512,1024,2048,4096,8192",
    ruler_lengths: Annotated[str, typer.Option(help="Lengths of the measure ruler.")] = "4096,8192,16384,32768",
    source: Annotated[Path | None, typer.Option(help="held_out.jsonl of code-data, for source and lines.")] = None,
    line_lengths: Annotated[str, typer.Option(help="Tokens before the lines of that measure.")] = "512,2048,8192",
    requests: Annotated[
        Path | None, typer.Option(help="File from `python -m benchmarks.quality requests`, for the measure tasks.")
    ] = None,
    eval_sets: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --requests, where lm-eval is: folder of the sets, for requests and metrics at once."
        ),
    ] = None,
    teacher: Teacher = "smollm2-135m",
    out: Out = RESULTS,
    work: Annotated[Path, typer.Option(help="Folder for models and checkpoints.")] = Path("quality-work"),
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Each training step as one CUDA graph, for small models.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="MLPs and norms through torch.compile while training.")
    ] = False,
    device: Device = None,
    cache: Cache = None,
) -> None:
    """Train and measure tables or single rows, side by side; go on where an earlier run stopped.

    A finished row is not repeated, a stopped one goes on from its checkpoint, a measure that a trained row lacks is
    added to it.

    [bold]Examples[/bold]

    Every preset beside teacher and window control:
    [cyan]python -m benchmarks.quality run presets --data books/ --eval-data held-out/[/cyan]

    Three seeds of two tables on two GPUs in nine minutes:
    [cyan]python -m benchmarks.quality run gates parts --seeds 0,1,2 --gpus 2 --jobs-per-gpu 3 --minutes 9 --data books/
    --eval-data held-out/[/cyan]

    One row, more measures: [cyan]python -m benchmarks.quality run recommended --measures loss,kl,length,passkey --data
    books/ --eval-data held-out/[/cyan]
    """
    with one_line_errors():
        import dataclasses

        import torch
        from rich.console import Console

        from benchmarks.quality.bench import Bench
        from benchmarks.quality.rows.find import find_rows
        from benchmarks.quality.runner import Runner
        from benchmarks.quality.selection import layer_order

        if not data or not eval_data:
            raise ValueError("--data and --eval-data are needed: training text and held-out documents")
        if eval_sets is not None and requests is None and "tasks" in read_names(measures):
            requests = work / "requests.xz"
            if not requests.is_file():
                work.mkdir(parents=True, exist_ok=True)
                recorded_lm().record_requests(eval_sets, read_tokenizer(teacher, cache)).save(requests)
        bench = Bench(
            teacher=teacher,
            data=data,
            eval_data=eval_data,
            budget=dataclasses.replace(
                read_budget(budget),
                **given(
                    stage0_steps=stage0_steps,
                    stage1_steps=stage1_steps,
                    stage2_steps=stage2_steps,
                    batch_size=batch_size,
                    sequence_length=seq_len,
                ),
            ),
            out=out,
            work=work,
            measures=read_names(measures),
            eval_length=eval_length,
            eval_documents=eval_documents,
            long_length=long_length,
            passkey_lengths=read_numbers(passkey_lengths, "--passkey-lengths"),
            passkey_trials=passkey_trials,
            found_lengths=read_numbers(found_lengths, "--found-lengths"),
            ruler_lengths=read_numbers(ruler_lengths, "--ruler-lengths"),
            source=source,
            line_lengths=read_numbers(line_lengths, "--line-lengths"),
            requests=requests,
            device=read_device(device),
            cuda_graph=cuda_graph,
            compile=compile,
            cache=cache,
        )
        there = torch.cuda.device_count() if bench.device == "cuda" else 0
        if gpus is not None and gpus > there:
            raise ValueError(f"--gpus is {gpus}, but {there} CUDA devices are here")
        rows = find_rows(
            names,
            read_seeds(seeds),
            bench.budget,
            order=layer_order(bench),
            layers=bench.num_layers(),
            with_controls=controls,
        )
        count = there if gpus is None else gpus
        runner = Runner(bench, Console(soft_wrap=True), gpus=range(count), jobs_per_gpu=jobs_per_gpu, minutes=minutes)
        fates = runner.run(rows)
        if eval_sets is not None and requests is not None and "tasks" in bench.measures:
            from benchmarks.quality.tasks.metrics import add_task_metrics
            from benchmarks.quality.tasks.requests import Requests

            add_task_metrics(
                bench.results,
                bench.scores,
                eval_sets,
                read_tokenizer(teacher, cache),
                Requests.load(requests),
                say=runner.say,
            )
        if any(fate == "failed" for fate in fates.values()):
            raise typer.Exit(1)


EvalSets = Annotated[Path, typer.Option(help="Folder with piqa/, hellaswag/, arc_easy/, lambada_openai/ and mmlu/.")]
Sets = Annotated[
    str,
    typer.Option(
        help="Of piqa, hellaswag, arc_easy, lambada_openai, mmlu, mmlu_letters; mmlu_letters:10 takes 10 a subject."
    ),
]


@app.command("requests", cls=Command)
def record_requests(
    eval_sets: EvalSets,
    out: Annotated[Path, typer.Option(help="File to write, .xz.")],
    sets: Sets = "piqa,hellaswag,arc_easy,lambada_openai,mmlu",
    limit: Annotated[int | None, typer.Option(help="Documents a task; default all.", min=1)] = None,
    teacher: Teacher = "smollm2-135m",
    cache: Cache = None,
) -> None:
    """Record what lm-eval asks a model, as token ids, so that a machine without lm-eval can answer.

    Then `run --measures tasks --requests FILE` scores it there, and `tasks` makes metrics of the scores here.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality requests --eval-sets eval/ --out requests.xz[/cyan]
    """
    with one_line_errors():
        from rich.console import Console

        requests = recorded_lm().record_requests(eval_sets, read_tokenizer(teacher, cache), read_names(sets), limit)
        requests.save(out)
        size = out.stat().st_size / 2**20
        Console(soft_wrap=True).print(f"{len(requests)} requests, {size:.1f} MiB, sha256 of the ids {requests.digest}")


@app.command("tasks", cls=Command)
def task_metrics(
    eval_sets: EvalSets,
    requests: Annotated[Path, typer.Option(help="The file that was scored.")],
    sets: Sets = "piqa,hellaswag,arc_easy,lambada_openai,mmlu",
    limit: Annotated[int | None, typer.Option(help="As the requests were recorded.", min=1)] = None,
    budget: BudgetName = "quick",
    teacher: Teacher = "smollm2-135m",
    out: Out = RESULTS,
    cache: Cache = None,
) -> None:
    """Turn scores into lm-eval's metrics, for every row that has scores and no metrics of them yet.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality tasks --eval-sets eval/ --requests requests.xz --budget full[/cyan]
    """
    with one_line_errors():
        from rich.console import Console

        from benchmarks.quality.tasks.requests import Requests

        recorded_lm()
        from benchmarks.quality.tasks.metrics import add_task_metrics

        console = Console(soft_wrap=True)
        add_task_metrics(
            out / f"{read_budget(budget).name}.jsonl",
            out / "scores" / read_budget(budget).name,
            eval_sets,
            read_tokenizer(teacher, cache),
            Requests.load(requests),
            read_names(sets),
            limit,
            lambda message: console.print(message, highlight=False),
        )


@app.command("mqar", cls=Command)
def mqar(
    mixers: Annotated[str, typer.Option(help="See MIXERS in mqar.py.")] = "attention,lizard,gla,window,kept",
    seeds: Annotated[str, typer.Option(help="Seeds, each a row of its own.")] = "0",
    steps: Annotated[int, typer.Option(help="Training steps.", min=1)] = 3000,
    batch_size: Annotated[int, typer.Option(help="Rows a step.", min=1)] = 64,
    length: Annotated[int, typer.Option(help="Tokens of a row.", min=8)] = 512,
    pairs: Annotated[str, typer.Option(help="Numbers of key-value pairs.")] = "16,32,64,128",
    vocabulary: Annotated[int, typer.Option(help="Half keys, half values.", min=8)] = 8192,
    width: Annotated[int, typer.Option(help="Width of the models.", min=4)] = 128,
    window: Annotated[int, typer.Option(help="Window of the hybrid.", min=1)] = 32,
    kept_window: Annotated[int | None, typer.Option(help="Window with kept keys; default a quarter.")] = None,
    kept_columns: Annotated[int | None, typer.Option(help="Feature columns with kept keys; default half.")] = None,
    score_every: Annotated[int, typer.Option(help="Steps between lessons of the scores.", min=1)] = 4,
    learning_rates: Annotated[str, typer.Option(help="Peak rates; each row keeps the best.")] = "1e-3,3e-3",
    precision: Annotated[str | None, typer.Option(help="fp32 or bf16; default bf16 on a GPU.")] = None,
    jobs: Annotated[int, typer.Option(help="Trainings side by side.", min=1)] = 1,
    minutes: Annotated[float | None, typer.Option(help="Start no training after this time.")] = None,
    out: Out = RESULTS,
    device: Device = None,
) -> None:
    """Associative recall from scratch: the hybrid beside attention, its linear branch, a window, and kept keys.

    Memories have the same number of bytes a layer. One record a mixer and seed in OUT/mqar.jsonl; finished ones are
    kept.

    [bold]Example[/bold]

    [cyan]python -m benchmarks.quality mqar --seeds 0,1,2 --jobs 8[/cyan]
    """
    with one_line_errors():
        from rich.console import Console

        from benchmarks.quality.mqar import MIXERS, KeptKeys, Recall, memory_line, run_recall

        kinds = read_names(mixers)
        if unknown := sorted(set(kinds) - set(MIXERS)):
            raise ValueError(f"--mixers: no {', '.join(unknown)}; known are {', '.join(MIXERS)}")
        place = read_device(device)
        tasks = [
            Recall(
                precision=precision or ("fp32" if place == "cpu" else "bf16"),
                length=length,
                pairs=tuple(read_numbers(pairs, "--pairs")),
                vocabulary=vocabulary,
                width=width,
                window=window,
                steps=steps,
                batch_size=batch_size,
                seed=seed,
                kept=KeptKeys(window=kept_window, columns=kept_columns, every=score_every),
            )
            for seed in read_seeds(seeds)
        ]
        console = Console(soft_wrap=True)
        for kind in kinds:
            console.print(memory_line(kind, tasks[0]), highlight=False)
        run_recall(
            out / "mqar.jsonl",
            [(kind, task) for task in tasks for kind in kinds],
            [float(rate) for rate in read_names(learning_rates)],
            device=place,
            jobs=jobs,
            minutes=minutes,
            say=lambda message: console.print(message, highlight=False),
        )


for name, command in COMMANDS.items():
    app.command(name, cls=Command)(command)
app.command("merge", cls=Command)(more_commands.merge)
app.command("teachers", cls=Command)(more_commands.teachers)
app.command("dry-run", cls=Command)(more_commands.dry_run)
app.command("code-data", cls=Command)(more_commands.code_data)

if __name__ == "__main__":
    app(prog_name="python -m benchmarks.quality")
