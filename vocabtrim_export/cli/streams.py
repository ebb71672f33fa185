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


def read_standard_input() -> str:
    """All of standard input, which is UTF-8 whatever the terminal's encoding. Raises `VocabtrimError`."""
    if sys.stdin is None:
        raise VocabtrimError("standard input is closed: give --prompt")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise VocabtrimError(
            f"standard input is not UTF-8 (byte 0x{byte:02x} at position {error.start}): convert it, as in "
            "`iconv --from-code latin1 --to-code utf-8`"
        ) from error
