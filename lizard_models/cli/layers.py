"""``lizard-attn layers``."""

from __future__ import annotations

from typing import Annotated

import typer

from lizard_models.cli.errors import one_line_errors
from lizard_models.cli.options import Cache, Device, DType, Encoding, read_device, read_dtype


def command(
    model: Annotated[str, typer.Argument(help="Folder of a model after stage 1 alone (linearize --stage2-steps 0).")],
    eval_data: Annotated[list[str], typer.Option(help="Long held-out documents. May be repeated.")],
    teacher: Annotated[str | None, typer.Option(help="Its teacher; default: the one the model records.")] = None,
    eval_length: Annotated[int, typer.Option(help="Positions of a document.", min=2)] = 1024,
    eval_documents: Annotated[int, typer.Option(help="Documents.", min=1)] = 4,
    text_field: Annotated[str | None, typer.Option(help="Field of a record that holds its text.")] = None,
    encoding: Encoding = "utf-8",
    device: Device = None,
    dtype: DType = None,
    cache: Cache = None,
) -> None:
    """Measure which layers most need the teacher's attention, to keep them softmax or give them a wider window.

    The model reads the documents once for every layer, with that layer alone back at the teacher's softmax attention;
    what this saves of the KL divergence from the teacher ranks the layers. A few of them usually hold nearly all that a
    window loses. Stage 1 comes first: untrained linear branches hide which layers these are.

    [bold]Example[/bold]

    [cyan]lizard-attn linearize smollm2-135m --data books/ --stage2-steps 0 --out after-stage1[/cyan]

    [cyan]lizard-attn layers after-stage1 --eval-data held-out/[/cyan]
    """
    with one_line_errors():
        from rich.console import Console
        from rich.table import Table

        from lizard_models.evaluation.restoration import restoration_savings
        from lizard_models.model.causal_lm import LizardCausalLM
        from lizard_models.model.layer_configs import lizard_config
        from lizard_models.teachers.find import load_teacher
        from lizard_models.teachers.loading import load_model
        from lizard_models.text.sequences import load_documents

        console = Console(soft_wrap=True)
        loaded = load_model(model, device=read_device(device), dtype=read_dtype(dtype), cache=cache)
        if not isinstance(loaded.model, LizardCausalLM):
            raise ValueError(f"model {model!r} is not linearized: make one with lizard-attn linearize --stage2-steps 0")
        if "stage2" in loaded.training.get("stages", {}):
            raise ValueError(
                f"model {model!r} is fine-tuned, so its layers are no longer the teacher's; wanted a model after "
                "stage 1 alone (linearize --stage2-steps 0)"
            )
        name = teacher or loaded.training.get("teacher")
        if name is None:
            raise ValueError(f"model {model!r} records no teacher: give --teacher")
        attention = lizard_config(loaded.model.config).attention
        exact = attention.window + attention.anchors
        if eval_length <= exact:
            raise ValueError(
                f"--eval-length is {eval_length}, wanted more than the {exact} positions of window and anchors, "
                "in which nothing is lost"
            )
        own = load_teacher(name, dtype=loaded.model.dtype, device=read_device(device), cache=cache)
        documents = load_documents(
            eval_data,
            own.tokenizer,
            eval_length + 1,
            count=eval_documents,
            text_field=text_field,
            encoding=encoding,
            vocab_size=own.model.config.vocab_size,
        )
        with console.status("measuring") as status:
            found = restoration_savings(
                loaded.model,
                own.model,
                documents.tokens,
                advance=lambda done, total: status.update(f"measuring: {done} of {total} forwards done"),
            )
        table = Table(title=f"KL to the teacher {found['kl']:.4f}; saved by restoring one layer")
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
