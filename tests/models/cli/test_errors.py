"""An error of the library names its argument, the command line the option."""

import pytest

from lizard_models.cli.errors import RUNNING, with_options

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
