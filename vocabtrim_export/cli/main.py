"""The entry points. Nothing heavy is imported before the arguments are understood."""

import argparse
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
from typing import NoReturn

from engines.errors import VocabtrimError
from vocabtrim_export.cli.streams import BROKEN_PIPE, discard_output, prepare_output
from vocabtrim_export.version import __version__

COMMANDS = {
    "export": "calibrate, trim and export a drafter and its target (what `vocabtrim-export` does)",
    "calibrate": "count the tokens that a model uses, for any K",
    "generate": "generate text with a target and a drafter",
    "inspect": "show what a bundle holds: sizes, inputs and outputs, profiles, layers",
    "verify": "check that a drafter leaves the target's output as it is, greedy and sampled",
    "bench": "measure what a drafter gains, against decoding with the target alone",
}
# what the extra `export` installs
_EXPORT_PACKAGES = {"accelerate", "gguf", "onnx_ir", "onnxscript", "sentencepiece", "torch", "transformers"}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, like all the others."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (see {self.prog} --help)\n")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there is something to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            super()._get_help_string(action)
            if action.default not in (None, []) and action.default is not False
            else action.help
        )


def main(argv: Sequence[str] | None = None) -> int:
    """`vocabtrim COMMAND …`. Returns the exit code.

    0; 1 where `verify` found a difference; 2 for a user's mistake; 130 after Ctrl-C; 141 where the reader of the output
    has gone, as after `| head`.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    return _in_one_line(lambda: _main(arguments))


def export_main(argv: Sequence[str] | None = None) -> int:
    """`vocabtrim-export …`, the main job by its own name."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return run_command("export", arguments, "vocabtrim-export")


def run_command(command: str, arguments: Sequence[str], prog: str) -> int:
    """Parse `arguments` for `command`, run it, and turn what goes wrong into one line. Returns the exit code."""
    return _in_one_line(lambda: _run(command, arguments, prog))


def _run(command: str, arguments: Sequence[str], prog: str) -> int:
    module = importlib.import_module(f"vocabtrim_export.cli.{command}_command")
    parser = Parser(prog=prog, description=module.__doc__, formatter_class=HelpFormatter)
    _add_version(parser)
    module.add_arguments(parser)
    options = parser.parse_args(arguments)
    _quiet_libraries()
    return module.run(options) or 0


def _main(arguments: Sequence[str]) -> int:
    parser = Parser(prog="vocabtrim", description="Trim a drafter's LM head, export it, run it losslessly, measure it.")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    _add_version(parser)
    lines = [f"  {name:<11}{text}" for name, text in COMMANDS.items()]
    parser.epilog = "commands:\n" + "\n".join(lines) + "\n\n`vocabtrim COMMAND --help` lists a command's options."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    command = parser.parse_args(arguments[:1]).command
    return _run(command, arguments[1:], f"vocabtrim {command}")


def _add_version(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--version", action="version", version=f"vocabtrim-export {__version__}")


def _in_one_line(run: Callable[[], int]) -> int:
    """What `run` returns; what goes wrong in it becomes one line on standard error and an exit code."""
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
        if (package := (error.name or "").partition(".")[0]) not in _EXPORT_PACKAGES:
            raise
        return _fail(f"this needs {package}, which is not installed: pip install 'vocabtrim-export[export]'")
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
        raise


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, which batch systems and containers stop a program with, ends the block as Ctrl-C does."""
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
    """Keep other libraries' notes off the terminal: what a user must know, we say."""
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
