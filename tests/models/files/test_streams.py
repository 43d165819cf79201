"""A run goes on without the terminal or the pipe that it was started in."""

import errno
import io
import os
import sys

import pytest

from lizard_models.files.streams import Lasting, console


class Gone(io.StringIO):
    """A stream that fails from its second line on."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.calls = number, 0

    def write(self, text: str) -> int:
        self.calls += 1
        if self.calls > 1:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_what_cannot_be_written_is_lost_and_said_once(monkeypatch, number):
    out, err = Gone(number), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    spoken = console()
    for line in "abc":
        spoken.print(line)
    assert out.getvalue() == "a\n" and out.calls == 2
    assert err.getvalue().count("note: standard output cannot be written any more") == 1
    assert os.strerror(number) in err.getvalue()
    monkeypatch.setattr(sys, "stderr", Gone(number))
    mute = console("stderr")
    for line in "abc":
        mute.print(line)
    assert sys.stderr.getvalue() == "a\n"


def test_a_pipe_that_nobody_reads_any_more(monkeypatch):
    """With a real descriptor, whose buffer would fail again at the end of the program."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        lasting = Lasting("stdout")
        assert lasting.write("a" * 100_000) == 100_000
        lasting.flush()
        assert lasting.lost and not lasting.isatty()
    monkeypatch.undo()


def test_the_stream_of_the_moment_is_written(capsys):
    console().print("there")
    console("stderr").print("beside")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("there\n", "beside\n")
