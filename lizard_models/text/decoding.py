"""Characters out of files: strictly, with the line of what is none."""

from __future__ import annotations

import codecs
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

UTF8 = "utf-8"
BLOCK = 1 << 20  # bytes
MARKS = {codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # with which a file in UTF-16 begins


def check_encoding(name: str) -> str:
    """The name of an encoding of text. Raises ValueError for one that Python does not know."""
    try:  # Python itself reads over other characters: "utf-8;" is utf-8 to it
        if re.fullmatch(r"\w[\w.-]*", name, re.ASCII) and codecs.lookup(name)._is_text_encoding:
            "a".encode(name)  # "undefined" is the name of one that reads and writes nothing
            return name
    except (LookupError, ValueError):
        pass
    raise ValueError(f"encoding: {name!r} is no encoding of text that Python knows; wanted utf-8, latin-1, utf-16 ...")


def read_text_file(path: Path, encoding: str = UTF8) -> str:
    """A whole file of text."""
    return "".join(text_pieces(path, encoding))


def text_pieces(path: Path, encoding: str = UTF8, piece: int = BLOCK, argument: str = "data") -> Iterator[str]:
    """The characters of a text file, at most ``piece`` at a time; a mark of its encoding in front is none of them.

    Raises ValueError, with file, line and remedy, for bytes that are not of the encoding, and for NUL characters,
    which text has none of. argument: what they call the file.
    """
    line = 1
    with path.open(encoding="utf-8-sig" if encoding == UTF8 else encoding) as file:
        while True:
            try:
                text = file.read(piece)
            except (UnicodeDecodeError, UnicodeError) as error:
                raise undecodable(path, encoding, argument) from error
            if not text:
                return
            if "\0" in text:
                line += text.count("\n", 0, text.index("\0"))
                raise ValueError(
                    f"{argument}: {str(path)!r}, line {line}, has a NUL character: it is no text, or in another "
                    "encoding; leave it out, or say what it is in with `encoding`, e.g. utf-16"
                )
            line += text.count("\n")
            yield text


def undecodable(path: Path, encoding: str, argument: str) -> ValueError:
    """The error for a file that is not in an encoding: the line, what stands there, what to do."""
    decoder = codecs.getincrementaldecoder(encoding)()
    line, found = 1, "it ends in the middle of a character"
    with path.open("rb") as file:
        start = file.read(2)
        file.seek(0)
        while True:
            block = file.read(BLOCK)
            try:
                line += decoder.decode(block, final=not block).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                byte = error.object[error.start]
                if "end" not in error.reason:
                    found = f"byte 0x{byte:02x}: {error.reason}"
                break
            except UnicodeError as error:
                found = str(error)
                break
            if not block:
                break
    likely = MARKS.get(start, "latin-1")
    if likely == encoding:
        likely = UTF8
    return ValueError(
        f"{argument}: {str(path)!r}, line {line}, is not {encoding.upper()} ({found}): convert the file, or say "
        f"what it is in with `encoding`, e.g. {likely}"
    )


def stream_text(stream: IO[Any], encoding: str = UTF8, piece: int = BLOCK) -> Iterator[str]:
    """The characters of standard input as they come. Raises ValueError for bytes that are not of the encoding."""
    if not hasattr(stream, "buffer"):
        while text := stream.read(piece):
            yield text
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    while True:
        block = stream.buffer.read1(piece)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeError as error:
            raise ValueError(
                f"prompt: standard input, after line {line}, is not {encoding.upper()} ({error}): convert it, or say "
                "what it is in with `encoding`"
            ) from error
        line += text.count("\n")
        if text:
            yield text
        if not block:
            return


def argument_text(text: str, argument: str) -> str:
    """Text of the command line, whatever the locale made of it. Raises ValueError for bytes that are not UTF-8."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError as error:
        raise ValueError(f"{argument}: it is not UTF-8 ({error}); give it in a file, with its `encoding`") from error
