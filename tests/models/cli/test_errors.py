"""An error of the library names its argument, the command line the option."""

import contextlib
import signal
import subprocess
import sys

import pytest
import typer

from lizard_models.cli.errors import RUNNING, explanation, is_of_the_system, one_line_errors, with_options


def test_what_the_system_refuses_in_a_file_of_weights_is_said():
    class SafetensorError(Exception):
        """Known by its name, so that no command has to import it."""

    large = SafetensorError("Error while serializing: I/O error: File too large (os error 27)")
    assert explanation(large) == "a file of weights: File too large" and is_of_the_system(large)
    tokenizer = Exception("File too large (os error 27)")  # as tokenizers raise it
    assert explanation(tokenizer) == "a file of the tokenizer: File too large" and is_of_the_system(tokenizer)
    assert explanation(Exception("error 27")) is None
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    assert "the disk is full" in explanation(full) and is_of_the_system(full)
    cut = SafetensorError("Error while deserializing header: incomplete metadata")
    assert "damaged or cut short" in explanation(cut) and not is_of_the_system(cut)


@pytest.mark.parametrize(("number", "what"), [(signal.SIGINT, "stopped"), (signal.SIGTERM, "stopped by SIGTERM")])
def test_what_a_signal_broke_off_ends_as_the_signal_asks(capsys, number, what):
    """An import that it ends in the middle leaves a module in part: whoever imports it next has another error."""

    def imports() -> str:
        raise AttributeError("partially initialized module")

    for go_on, again in (
        (imports, "repeat the command to go on"),
        (lambda: "lizard-attn x", "go on with: lizard-attn x"),
    ):
        with pytest.raises(typer.Exit) as end, one_line_errors(go_on):
            with contextlib.suppress(KeyboardInterrupt):
                signal.raise_signal(number)
            imports()
        assert end.value.exit_code == 128 + number
        assert capsys.readouterr().err == f"{what}; nothing half-written is left; {again}\n"
    with pytest.raises(AttributeError), one_line_errors():
        imports()


ENDS = """
import atexit, sys, time
atexit.register(lambda: (print("ends", flush=True), time.sleep(60)))
sys.argv = ["lizard-attn", "--help"]
from lizard_models.cli.main import main
main()
"""


def test_ctrl_c_while_python_ends_is_no_error():
    command = [sys.executable, "-c", ENDS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert any(line == "ends\n" for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "" and process.wait(30) == -signal.SIGINT


def test_a_process_that_is_gone_is_said_where_there_were_several(monkeypatch):
    gone = RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert explanation(gone) is None and not is_of_the_system(gone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert explanation(gone).startswith("another process of this run has gone") and is_of_the_system(gone)
    assert explanation(RuntimeError("shapes do not fit")) is None  # a fault of ours keeps its traceback


OPTIONS = {"out": "--out", "seq_len": "--seq-len", "resume": "--resume", "text_field": "--text-field"}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("out: 'a' exists already; give another folder", "--out: 'a' exists already; give another folder"),
        ("data: out of reach: no such file", "data: out of reach: no such file"),
        ("work: unfinished; go on with resume=True", "work: unfinished; go on with --resume"),
        ("leave `resume` out", "leave --resume out"),
        ("give more text or a smaller seq_len", "give more text or a smaller --seq-len"),
        ("one sequence of seq_len=8", "one sequence of seq_len=8"),
        ("'/tmp/text_field.json' is damaged", "'/tmp/text_field.json' is damaged"),
    ],
)
def test_arguments_become_options(text, shown):
    assert with_options(text) == text  # no command runs, so nothing changes
    token = RUNNING.set(OPTIONS)
    try:
        assert with_options(text) == shown
    finally:
        RUNNING.reset(token)
