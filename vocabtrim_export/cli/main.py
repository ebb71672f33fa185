"""The entry points. Nothing heavy is imported before the arguments are understood."""

import argparse
import difflib
import errno
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from engines.errors import VocabtrimError
from vocabtrim_export.cli.streams import BROKEN_PIPE, discard_output, prepare_output
from vocabtrim_export.extras import missing_extra
from vocabtrim_export.version import __version__

COMMANDS = {
    "export": "choose the drafter's tokens, trim its LM head and write both bundles (as `vocabtrim-export` does)",
    "calibrate": "count how often a model uses each token; the counts serve exports with any K",
    "generate": "generate text with a target and a drafter",
    "chat": "hold a conversation with a target and a drafter in the terminal",
    "inspect": "show what a bundle holds: sizes, inputs and outputs, TensorRT profiles, layers",
    "serve": "answer requests over HTTP by OpenAI's protocol",
    "verify": "check that the output with a drafter is the target's own, greedy and sampled",
    "bench": "measure how much faster a drafter makes decoding than the target alone",
    "report": "explain an export on one page: what it keeps and loses, what was measured, where it comes from",
}
_WORDS = """words:
  target     the language model whose output is wanted
  drafter    a smaller model that proposes tokens; the target verifies several of them in one step
  K          the number of tokens that the drafter's trimmed LM head keeps, a row each
  bundle     a directory that holds an exported model: graphs or plans, weights, tokenizer and a manifest
  MODEL      a model to export: a hub id, a local directory or a .gguf file
"""
_EXAMPLE = "example:"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, and which takes an option by its whole name only.

    An abbreviation may mean another option: `--prompt` of `generate` is no `--prompts` of `verify`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            wrong = message.split()[2].partition("=")[0]
            close = difflib.get_close_matches(wrong, self._option_string_actions, 1)
            if close:
                value = self._option_string_actions[close[0]].metavar
                message += f"; did you mean {close[0]}{f' {value}' if isinstance(value, str) else ''}?"
        if message.endswith(": expected one argument"):
            option = message.split()[1].split("/")[-1].rstrip(":")
            message += f"; a value that begins with a dash is given as {option}=-VALUE"
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


def _path(text: str) -> Path:
    """Parse an option that is a path; an empty one would be the current directory.

    A shell leaves the `~` of `--output=~/out` to the program.
    """
    if not text:
        raise argparse.ArgumentTypeError("the path is empty, as that of a shell variable which is not set")
    return Path(os.path.expanduser(text))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where it is a value, not where an option is merely on or off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            super()._get_help_string(action)
            if action.default not in (None, []) and not isinstance(action.default, bool | list)
            else action.help
        )

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Leave the example in one line, as it is copied."""
        return text if text.startswith(_EXAMPLE) else super()._fill_text(text, width, indent)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `vocabtrim COMMAND …`.

    Args:
        argv: The command and its options; None: those of the process.

    Returns:
        The exit code: 0; 1 where `verify` or `bench` found a difference; 2 for a user's mistake; 130 after Ctrl-C; 141
        where the reader of the output has gone, as after `| head`.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    return _in_one_line(lambda: _main(arguments))


def export_main(argv: Sequence[str] | None = None) -> int:
    """Run `vocabtrim-export …`, which is `vocabtrim export …`. Arguments and exit codes are those of `main`."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return run_command("export", arguments, "vocabtrim-export")


def run_command(command: str, arguments: Sequence[str], prog: str) -> int:
    """Run a command; an error becomes one line on standard error.

    Args:
        command: A key of `COMMANDS`.
        arguments: The command's options.
        prog: The program's name in its help and errors.

    Returns:
        The exit code, see `main`.
    """
    return _in_one_line(lambda: _run(command, arguments, prog))


def make_parser(command: str, prog: str) -> Parser:
    """Returns the parser of a command. The arguments are those of `run_command`."""
    module = importlib.import_module(f"vocabtrim_export.cli.{command}_command")
    example = f"{_EXAMPLE}\n  {prog} {module.EXAMPLE}"
    parser = Parser(prog=prog, description=module.__doc__, epilog=example, formatter_class=HelpFormatter)
    _add_version(parser)
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
    return parser


def _run(command: str, arguments: Sequence[str], prog: str) -> int:
    options = make_parser(command, prog).parse_args(arguments)
    _quiet_libraries()
    return options.run(options) or 0


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="vocabtrim",
        description="Make speculative decoding faster: trim the drafter's LM head to the tokens that it uses, export\n"
        "both models, generate with them what the target alone would, and measure the gain.",
    )
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    _add_version(parser)
    lines = [f"  {name:<11}{text}" for name, text in COMMANDS.items()]
    parser.epilog = "\n".join(
        ("commands:", *lines, "", _WORDS, "`vocabtrim COMMAND --help` lists a command's options.")
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    command = parser.parse_args(arguments[:1]).command
    return _run(command, arguments[1:], f"vocabtrim {command}")


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"vocabtrim-export {__version__}")


def _in_one_line(run: Callable[[], int]) -> int:
    """Returns what `run` returns. An error in it becomes one line on standard error and an exit code."""
    prepare_output()
    try:
        try:
            with _terminated_as_interrupted():
                return run()
        finally:
            sys.stdout.flush()  # where the reader of a pipe has gone, this must fail here and not when Python exits
    except VocabtrimError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if (message := missing_extra(error)) is None:
            raise
        return _fail(message)
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left behind", file=sys.stderr)
        return 130
    except MemoryError:
        return _fail("out of memory: lower --max-length, or use a smaller --dtype")
    except BrokenPipeError:
        discard_output()
        return BROKEN_PIPE
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _fail(f"the disk is full: free some space and run it again ({error.filename or error.strerror})")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return _fail(f"no permission to write {error.filename or 'the output'}: choose another --output")
        if error.filename is None:
            raise
        return _fail(f"{error.filename}: {error.strerror}: give another path")


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Make SIGTERM, with which batch systems and containers stop a program, end the block as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _quiet_libraries() -> None:
    """Keep other libraries' notes off the terminal: the commands themselves tell the user what matters."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torch.onnx._internal", "transformers", "onnxscript", "onnx_ir", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # it reads the environment when it is imported
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
