"""The entry points. Nothing heavy is imported before the arguments are understood."""

import argparse
import errno
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from engines.errors import VocabtrimError

COMMANDS = {
    "export": "calibrate, trim and export a drafter and its target (what `vocabtrim-export` does)",
    "calibrate": "count the tokens that a model uses, for any K",
    "generate": "generate text with a target and a drafter",
    "inspect": "show what a bundle holds: sizes, inputs and outputs, profiles, layers",
    "verify": "check that a drafter leaves the target's output as it is, greedy and sampled",
    "bench": "measure what a drafter gains, against decoding with the target alone",
}


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

    0; 1 where `verify` found a difference; 2 for a user's mistake; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(prog="vocabtrim", description="Trim a drafter's LM head, export it, run it losslessly, measure it.")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    lines = [f"  {name:<11}{text}" for name, text in COMMANDS.items()]
    parser.epilog = "commands:\n" + "\n".join(lines) + "\n\n`vocabtrim COMMAND --help` lists a command's options."
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    command = parser.parse_args(arguments[:1]).command
    return run_command(command, arguments[1:], f"vocabtrim {command}")


def export_main(argv: Sequence[str] | None = None) -> int:
    """`vocabtrim-export …`, the main job by its own name."""
    return run_command("export", sys.argv[1:] if argv is None else list(argv), "vocabtrim-export")


def run_command(command: str, arguments: Sequence[str], prog: str) -> int:
    """Parse `arguments` for `command`, run it, and turn what goes wrong into one line."""
    module = importlib.import_module(f"vocabtrim_export.cli.{command}_command")
    parser = Parser(prog=prog, description=module.__doc__, formatter_class=HelpFormatter)
    module.add_arguments(parser)
    options = parser.parse_args(arguments)
    _quiet_libraries()
    try:
        return module.run(options) or 0
    except VocabtrimError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        print("interrupted: nothing half-written was left behind", file=sys.stderr)
        return 130
    except MemoryError:
        return _fail("out of memory: lower --max-length, or use a smaller --dtype")
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return _fail(f"the disk is full: free some space and run it again ({error.filename or error.strerror})")
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return _fail(f"no permission to write {error.filename or 'the output'}: choose another --output")
        raise


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
