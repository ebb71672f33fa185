"""Standard streams that also work with terminals of few characters, broken pipes and closed files."""

import io
import os
import sys
from contextlib import suppress

from engines.errors import VocabtrimError

BROKEN_PIPE = 128 + 13  # the exit code of a program that SIGPIPE ends, as shells report it


def prepare_output() -> None:
    """Make standard output and error take any text.

    A character that the terminal's encoding lacks becomes "?" (an escape on standard error). A closed stream is
    replaced by one that discards.
    """
    for name, errors in (("stdout", "replace"), ("stderr", "backslashreplace")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def discard_output() -> None:
    """Discard all further output, the interpreter's own at its exit included: the reader of the pipe has gone."""
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(nowhere.fileno(), stream.fileno())


def read_prompt(text: str | None) -> str:
    """Returns the text of `--prompt`, or all of standard input, which is UTF-8 whatever the terminal's encoding.

    Args:
        text: The option's value; None where it was not used.

    Raises:
        VocabtrimError: The bytes are not UTF-8, or there is no text.
    """
    where = "standard input" if text is None else "--prompt"
    if text is None and sys.stdin is None:
        raise VocabtrimError("standard input is closed: give --prompt")
    prompt = utf8_text(sys.stdin.buffer.read() if text is None else text, where)
    if not prompt.strip():
        raise VocabtrimError(f"the prompt is empty: {where} holds no text")
    return prompt


def utf8_text(data: bytes | str, where: str) -> str:
    """Returns the text that UTF-8 bytes hold, without a byte order mark.

    Args:
        data: Bytes, or text in which escapes stand for the bytes that are not UTF-8, as Python reads arguments.
        where: Their source, for the error.

    Raises:
        VocabtrimError: They are not UTF-8.
    """
    data = data.encode("utf-8", "surrogateescape") if isinstance(data, str) else data
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VocabtrimError(
            f"{where} is not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start}): convert it, as with "
            "`iconv --from-code latin1 --to-code utf-8`"
        ) from error


def prepare_input() -> bool:
    """Make standard input ready for `read_line`, with line editing where a person types.

    Returns:
        Whether standard input and output are a terminal.

    Raises:
        VocabtrimError: Standard input is closed.
    """
    if sys.stdin is None:
        raise VocabtrimError("standard input is closed: give it a line for each message")
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    with suppress(ImportError):  # Windows has none
        import readline  # `input` uses it

        if os.environ.get("TERM", "dumb") != "dumb":  # which would show the terminal's marks around a paste
            readline.parse_and_bind("set enable-bracketed-paste on")  # lines that are pasted together are one message
    return True


def read_line(prompt: str | None) -> str | None:
    """Returns the next line of standard input; None at its end, and where a person types Ctrl-C.

    Args:
        prompt: The text before the line in a terminal; None where no person types.

    Raises:
        VocabtrimError: The line is not UTF-8.
    """
    if prompt is None:
        line = sys.stdin.readline()
        return utf8_text(line, "standard input").rstrip("\n") if line else None
    try:
        return utf8_text(input(prompt), "the message")
    except (EOFError, KeyboardInterrupt):
        print()  # the shell's prompt gets a line of its own
        return None
