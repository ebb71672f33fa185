"""Standard streams as terminals, pipes and shells have them."""

import io
import os
import sys

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
    """After the reader of a pipe has gone: nothing more is written, not even by the interpreter when it exits."""
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(nowhere.fileno(), stream.fileno())


def read_prompt(given: str | None) -> str:
    """The prompt that `--prompt` gave, or all of standard input, which is UTF-8 whatever the terminal's encoding.

    Raises `VocabtrimError` for bytes that are not UTF-8 and where there is no text.
    """
    where = "standard input" if given is None else "--prompt"
    if given is None and sys.stdin is None:
        raise VocabtrimError("standard input is closed: give --prompt")
    data = sys.stdin.buffer.read() if given is None else given.encode("utf-8", "surrogateescape")
    try:
        prompt = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise VocabtrimError(
            f"{where} is not UTF-8 (byte 0x{data[error.start]:02x} at position {error.start}): convert it, as with "
            "`iconv --from-code latin1 --to-code utf-8`"
        ) from error
    if not prompt.strip():
        raise VocabtrimError(f"the prompt is empty: {where} holds no text")
    return prompt
