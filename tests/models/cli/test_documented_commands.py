"""Every command that the documents and the help texts show is one that the command line takes."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from benchmarks.quality.__main__ import app as quality
from lizard_models.cli.main import app

ROOT = Path(__file__).parents[3]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
QUALITY = "python -m benchmarks.quality "
SHOWN = re.compile(rf"^(?:.*&& )?((?:lizard-attn |torchrun |accelerate launch |{re.escape(QUALITY)}).*)$")
LAUNCHER = re.compile(r"^(?:torchrun|accelerate launch) .*?-m lizard_models ")


def commands_in(text: str) -> list[str]:
    """The commands of a document's code blocks, lines that go on joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    blocks = re.findall(r"```(?:sh|console)\n(.*?)```|((?:^ {4,}\S.*\n)+)", joined, re.S | re.M)
    lines = (line.strip().removeprefix("$ ") for block in blocks for line in "".join(block).splitlines())
    return [match[1] for line in lines if (match := SHOWN.match(line))]


def parse(command: str) -> None:
    """Reads a command's arguments as the command line does, without running it."""
    words = LAUNCHER.sub("lizard-attn ", command).removeprefix(QUALITY).removeprefix("lizard-attn ")
    arguments = shlex.split(words, comments=True)
    redirected = next((i for i, argument in enumerate(arguments) if argument in ("<", "|", ">")), None)
    arguments = arguments[:redirected]
    chosen = typer.main.get_command(quality if command.startswith(QUALITY) else app)
    while hasattr(chosen, "commands") and arguments and arguments[0] in chosen.commands:
        chosen = chosen.commands[arguments.pop(0)]
    assert not hasattr(chosen, "commands"), f"no such command: {command}"
    chosen.make_context(command, arguments)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documented_commands_exist(document):
    for command in commands_in(document.read_text(encoding="utf-8")):
        parse(command)


def test_the_quickstart_shows_every_step():
    shown = " ".join(commands_in((ROOT / "docs" / "quickstart.md").read_text(encoding="utf-8")))
    for name in ("demo", "info", "linearize", "generate", "eval"):
        assert f"lizard-attn {name}" in shown


def leaves(command, name: str = ""):
    """Every command below a group, with the words that call it."""
    if not hasattr(command, "commands"):
        yield name.strip(), command
        return
    for word, below in command.commands.items():
        yield from leaves(below, f"{name} {word}")


COMMANDS = dict(leaves(typer.main.get_command(app))) | dict(leaves(typer.main.get_command(quality), QUALITY))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches_by_examples_that_work(name):
    shown = re.findall(r"\[cyan\](.*?)\[/cyan\]", COMMANDS[name].help or "", re.S)
    examples = [text for text in (re.sub(r"\s+", " ", part) for part in shown) if SHOWN.match(text)]
    assert examples or not COMMANDS[name].params, f"{name} has no example"
    for example in examples:
        if len(example.split()) > 2 or example.split()[1] == name:  # another's name alone only points to it
            parse(example)
