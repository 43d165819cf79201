"""``lizard-attn layers``."""

from __future__ import annotations

from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors
from lizard_models.cli.options import Cache, Device, DType, Settings, read_device, read_dtype, read_settings


def command(
    teacher: Annotated[str, typer.Argument(help="Hub name, local folder, or smollm2-135m.")],
    eval_data: Annotated[list[str], typer.Option(help="Long held-out documents. May be repeated.")],
    preset: Annotated[str, typer.Option(help="Preset the teacher would be linearized with.")] = "recommended",
    settings: Settings = None,
    eval_length: Annotated[int, typer.Option(help="Positions of a document.", min=2)] = 2048,
    eval_documents: Annotated[int, typer.Option(help="Documents.", min=1)] = 4,
    text_field: Annotated[str | None, typer.Option(help="Field of a record that holds its text.")] = None,
    device: Device = None,
    dtype: DType = None,
    cache: Cache = None,
) -> None:
    """Measure which layers most need the teacher's attention, before any training.

    The untrained student reads the documents once for every layer, with that layer alone left to the teacher's softmax
    attention; what this saves of the KL divergence from the teacher ranks the layers. A few of them usually hold nearly
    all that a window loses: keep these softmax, or give them a wider window.

    [bold]Example[/bold]

    [cyan]lizard-attn layers smollm2-135m --eval-data held-out/[/cyan]
    """
    with one_line_errors():
        import torch
        from rich.console import Console
        from rich.table import Table

        from lizard_models.config import LizardConfig
        from lizard_models.convert import linearize
        from lizard_models.data import load_documents
        from lizard_models.evaluation.restoration import restoration_savings
        from lizard_models.teachers import load_teacher

        console = Console(soft_wrap=True)
        config = LizardConfig.preset(preset).replace(**read_settings(settings))
        exact = config.attention.window + config.attention.anchors
        if eval_length <= exact:
            raise ValueError(
                f"--eval-length is {eval_length}, wanted more than the {exact} positions of window and anchors, "
                "in which nothing is lost"
            )
        loaded = load_teacher(
            teacher,
            dtype=read_dtype(dtype) or torch.float32,
            device=read_device(device),
            cache=cache,
            say=console.print,
        )
        documents = load_documents(
            eval_data,
            loaded.tokenizer,
            eval_length + 1,
            count=eval_documents,
            text_field=text_field,
            vocab_size=loaded.model.config.vocab_size,
        )
        student = linearize(loaded.model, config).requires_grad_(False)
        with console.status("measuring") as status:
            found = restoration_savings(
                student,
                loaded.model,
                documents.tokens,
                advance=lambda layer: status.update(f"measuring: layer {layer} done"),
            )
        table = Table(title=f"KL to the teacher {found['kl']:.4f} untrained; saved by restoring one layer")
        for column in ("rank", "layer", "saved", "share"):
            table.add_column(column, justify="right")
        for rank, layer in enumerate(found["order"], 1):
            saved = found["saved"][layer]
            table.add_row(str(rank), str(layer), f"{saved:.4f}", f"{saved / found['kl']:.1%}")
        console.print(table)
        for share in (0.125, 0.25):
            count = max(1, round(share * len(found["order"])))
            best = ",".join(map(str, sorted(found["order"][:count])))
            console.print(f"{share:.1%} of the layers: --softmax-layers {best}", highlight=False)
            console.print(f"or, in constant memory: --set wide_layers=[{best}]", highlight=False, markup=False)
