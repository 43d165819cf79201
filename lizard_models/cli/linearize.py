"""``lizard-attn linearize``."""

from __future__ import annotations

import contextlib
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lizard_models.cli.errors import one_line_errors
from lizard_models.cli.options import (
    Cache,
    Device,
    DType,
    Encoding,
    KeepSliding,
    KeptKeys,
    Settings,
    SoftmaxLayers,
    SoftmaxShare,
    read_device,
    read_dtype,
    read_kept,
    read_kept_keys,
    read_numbers,
    read_resume,
    read_settings,
)


def command(
    teacher: Annotated[str, typer.Argument(help="Hub name, local folder, or smollm2-135m.")],
    out: Annotated[Path, typer.Option(help="Folder for the finished model; must not exist yet.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training text: .txt, .json, .jsonl, .parquet or .npy (token ids), a folder, or a hub data set. "
            "May be repeated. Default: the preset's data set."
        ),
    ] = None,
    preset: Annotated[
        str, typer.Option(help="paper, paper_literal, plain, recommended, lolcats, liger or window_only.")
    ] = "recommended",
    settings: Settings = None,
    kept_keys: KeptKeys = None,
    state_mib: Annotated[
        float | None,
        typer.Option(
            help="MiB that one sequence's state may take with float32 keys, in place of --kept-keys and the preset's: "
            "after stage 0 the layers and heads where kept keys save most get them.",
            min=0,
        ),
    ] = None,
    softmax_layers: SoftmaxLayers = None,
    softmax_share: SoftmaxShare = None,
    keep_sliding: KeepSliding = None,
    widen: Annotated[
        int,
        typer.Option(help="Layers that get a window of wide_window after stage 1: those that need it most.", min=0),
    ] = 0,
    stage0_steps: Annotated[
        int | None, typer.Option(help="Steps of stage 0, which fits the scores of kept keys; 0 leaves it out.", min=0)
    ] = None,
    stage1_steps: Annotated[int | None, typer.Option(help="Steps of stage 1; 0 leaves it out.", min=0)] = None,
    stage2_steps: Annotated[int | None, typer.Option(help="Steps of stage 2; 0 leaves it out.", min=0)] = None,
    stage3_steps: Annotated[
        int | None,
        typer.Option(
            help="Steps of stage 3, which goes on with stage 2 on longer rows; without it, or with 0, none.", min=0
        ),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Begin with the stage 1 that is finished in this folder: a model saved after it, or OUT.training.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step, in stages 1 and 2.", min=1)] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a training sequence, in stages 1 and 2.", min=2)
    ] = None,
    micro_batch_size: Annotated[
        int | None, typer.Option(help="Sequences that go through at a time; less memory, same result.", min=1)
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Stages 2 and 3 with less memory and a quarter slower.")
    ] = False,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Share the weights among the processes of torchrun, for large teachers.")
    ] = False,
    context_parallel: Annotated[
        int,
        typer.Option(help="Processes of torchrun over which each long sequence of stages 1 to 3 lies in parts.", min=1),
    ] = 1,
    cuda_graph: Annotated[
        bool, typer.Option("--cuda-graph", help="Each training step as one CUDA graph, faster for small models.")
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="MLPs and norms through torch.compile while training.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Seed of data order and starts.")] = None,
    text_field: Annotated[str | None, typer.Option(help="Field of a record that holds its text.")] = None,
    encoding: Encoding = "utf-8",
    eval_data: Annotated[
        list[str] | None, typer.Option(help="Held-out documents for the loss by position. May be repeated.")
    ] = None,
    eval_length: Annotated[int, typer.Option(help="Positions of an evaluation document.", min=2)] = 4096,
    eval_documents: Annotated[int, typer.Option(help="Evaluation documents.", min=1)] = 8,
    passkey: Annotated[str | None, typer.Option(help="Lengths of passkey tests, e.g. 256,1024.")] = None,
    device: Device = None,
    dtype: DType = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints.", min=1)] = 50,
    report_to: Annotated[
        str | None,
        typer.Option(
            help="Where transformers' Trainer reports to as well, e.g. tensorboard,wandb; losses, rates, speed and "
            "memory are in the model's log.jsonl anyway.",
            show_default=False,
        ),
    ] = None,
    diverged: Annotated[
        float,
        typer.Option(
            help="A loss over this times its running median is warned of, then rolled back once at half the rate, then "
            "stops the run."
        ),
    ] = 3.0,
    log_attention_every: Annotated[
        int,
        typer.Option(
            help="Steps between readings of every layer's gates, linear share and error, in log.jsonl and the report; "
            "0 makes none.",
            min=0,
        ),
    ] = 0,
    peak_tflops: Annotated[
        float | None,
        typer.Option(
            help="TFLOP/s of one device, for model-flops use; default: what is known of it.", show_default=False
        ),
    ] = None,
    cache: Cache = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="Go on with a run that stopped; --resume auto: if there is one, else begin it, and a finished run is "
            "no error, for schedulers that start a command again.",
            metavar="[auto]",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show shapes, new parameters, and estimates of memory and time.")
    ] = False,
    show_recipe: Annotated[
        bool, typer.Option("--show-recipe", help="Only print these options as a recipe file for lizard-attn run.")
    ] = False,
) -> None:
    """Turn a teacher into a Lizard: stage 1 imitates its attention, stage 2 fine-tunes with LoRA.

    Stage 0 before them learns which keys to keep: 608 a key head in preset recommended, none in plain.

    [bold]Examples[/bold]

    The defaults, on a data set of the hub:
    [cyan]lizard-attn linearize HuggingFaceTB/SmolLM2-135M-Instruct --data yahma/alpaca-cleaned --out my-lizard[/cyan]

    The paper's recipe, to the last number:
    [cyan]lizard-attn linearize meta-llama/Llama-3.2-1B --preset paper --out paper-1b[/cyan]

    Stage 1 alone on your own text, measured on held-out books:
    [cyan]lizard-attn linearize smollm2-135m --data books/ --eval-data held-out/ --stage1-steps 400 --stage2-steps 0
    --out my-lizard[/cyan]

    Untrained, for a teacher larger than memory: [cyan]lizard-attn convert[/cyan], or no steps in any stage.

    Nearer to the teacher in constant memory: a window of 1024 in the eight layers that need it most:
    [cyan]--widen 8[/cyan]

    Fewer kept keys than the preset's 608 a key head, shared out as these are over layers and heads by what they save:
    [cyan]--kept-keys 256[/cyan]; with little text also [cyan]--set stage0.sequence_length=1024 --seq-len 1024[/cyan]

    As many as so much memory holds: [cyan]--state-mib 25[/cyan]

    Without kept keys and stage 0, in less memory and on a CPU: [cyan]--preset plain[/cyan]

    A quarter of the layers kept as they are: [cyan]--softmax-share 0.25[/cyan], or by number:
    [cyan]--softmax-layers 3,11,19,27[/cyan]

    At the end 50 more steps on rows of 16384 tokens: [cyan]--stage3-steps 50 --set stage3.sequence_length=16384[/cyan]

    On several GPUs, with the weights shared among them:
    [cyan]torchrun --nproc-per-node 8 -m lizard_models linearize meta-llama/Llama-3.1-8B --preset paper
    --fsdp --out paper-8b[/cyan]

    Another stage 2 after the same stage 1, from its model or from the work of a run that has passed it:
    [cyan]lizard-attn linearize smollm2-135m --data books/ --from my-lizard --out another[/cyan]

    What it would take, without weights: [cyan]lizard-attn linearize meta-llama/Meta-Llama-3-8B --preset paper
    --gradient-checkpointing --dry-run --out paper-8b[/cyan]

    All of it as a file, which lizard-attn run carries out: [cyan]lizard-attn linearize smollm2-135m --data books/
    --show-recipe --out my-lizard > recipe.yaml[/cyan]

    A variant: [cyan]--set attention.window=64 --set stage1.learning_rate=3e-3[/cyan]
    """
    with one_line_errors(lambda: _resume_command(out)):
        from lizard_models.cli.carry_out import carry_out, describe
        from lizard_models.config import LizardConfig
        from lizard_models.files import streams
        from lizard_models.runs.convert_folder import linearize_folder
        from lizard_models.runs.linearize_run import Plan
        from lizard_models.runs.recipe_show import preset_data

        changes = read_settings(settings)
        chosen = LizardConfig.preset(preset).replace(**changes)
        chosen = chosen.replace(**read_kept(softmax_layers, softmax_share, keep_sliding))
        chosen = chosen.replace(**read_kept_keys(kept_keys))
        if state_mib is not None and kept_keys is None and "kept_keys" not in changes.get("attention", {}):
            chosen = chosen.replace(attention={"kept_keys": 0})  # the preset's give way to the budget
        if stage0_steps and not chosen.attention.keeps_keys and state_mib is None:
            raise ValueError(
                "--stage0-steps: stage 0 fits the scores of kept keys, and there are none; give --kept-keys"
            )
        if not stage3_steps and any(setting.startswith("stage3.") for setting in settings or ()):
            raise ValueError("--stage3-steps: stage 3 is left out, and --set changes its recipe; give it steps")
        chosen = chosen.replace(
            stage0=_recipe(stage0_steps, None, None, seed),
            stage1=_recipe(stage1_steps, batch_size, seq_len, seed),
            stage2=_recipe(stage2_steps, batch_size, seq_len, seed),
            stage3=_recipe(stage3_steps, None, None, seed),
        )
        plan = Plan(
            teacher=teacher,
            config=chosen,
            out=out,
            data=data or preset_data(chosen),
            eval_data=eval_data or [],
            eval_length=eval_length,
            eval_documents=eval_documents,
            passkey_lengths=read_numbers(passkey, "--passkey"),
            stage0=stage0_steps != 0,
            stage1=stage1_steps != 0,
            stage2=stage2_steps != 0,
            stage3=bool(stage3_steps),
            start=start,
            widen=widen,
            state_mib=state_mib,
            text_field=text_field,
            encoding=encoding,
            dtype=read_dtype(dtype),
            device=device,
            micro_batch_size=micro_batch_size,
            gradient_checkpointing=gradient_checkpointing,
            fsdp=fsdp,
            context_parallel=context_parallel,
            cuda_graph=cuda_graph,
            compile=compile,
            save_steps=save_steps,
            report_to=tuple(name.strip() for name in (report_to or "").split(",") if name.strip()),
            diverged=diverged,
            log_attention_every=log_attention_every,
            peak_tflops=peak_tflops,
            resume=read_resume(resume),
            cache=cache,
        )
        if show_recipe:
            from lizard_models.runs.recipe_show import show

            return typer.echo(show(plan), nl=False)
        console = streams.console()
        if dry_run:
            return describe(plan, console)
        scored = chosen.attention.keeps_keys and stage0_steps != 0
        untrained = start is None and stage1_steps == 0 and stage2_steps == 0 and not scored
        if untrained and not eval_data and not passkey and not widen and state_mib is None:
            # Nothing is trained or measured, so the teacher need not fit into memory.
            folder = linearize_folder(teacher, out, chosen, dtype=read_dtype(dtype), cache=cache, say=console.print)
            console.print(f"saved, untrained: {folder}")
            return
        plan.device = read_device(device)
        carry_out(plan, console)


def _recipe(steps: int | None, batch_size: int | None, seq_len: int | None, seed: int | None) -> dict[str, Any]:
    changes: dict[str, Any] = {"batch_size": batch_size, "sequence_length": seq_len, "seed": seed}
    if steps:
        changes |= {"max_steps": steps}
    changes = {name: value for name, value in changes.items() if value is not None}
    return changes | ({"epochs": None} if steps else {})


def _resume_command(out: Path) -> str:
    from lizard_models.distill.parallel import process_count
    from lizard_models.files.sources import expanded
    from lizard_models.runs.plan import work_folder
    from lizard_models.runs.work import has_checkpoints

    begun = False
    with contextlib.suppress(OSError, ValueError):  # of a place that cannot be
        begun = out.name not in ("", "..") and has_checkpoints(work_folder(expanded(out, "out")))
    if process_count() > 1:
        return "the same torchrun command" + " and --resume" * begun
    arguments = sys.argv[1:]
    if not any(argument.startswith("--resume") for argument in arguments) and begun:
        arguments = [*arguments, "--resume"]
    return shlex.join(["lizard-attn", *arguments])
