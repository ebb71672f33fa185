"""Hold a conversation with a target in the terminal; a drafter makes it faster and leaves the answers as they are."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from engines.errors import ContextExceededError, VocabtrimError
from vocabtrim_export.cli.decoder_arguments import (
    add_decoder_arguments,
    add_sampling_arguments,
    add_stop_argument,
    load_decoder,
    sampling_params,
)
from vocabtrim_export.cli.figures import figures_line, print_text
from vocabtrim_export.cli.prompt_arguments import add_template_arguments, template_args
from vocabtrim_export.cli.streams import prepare_input, read_line, utf8_text

if TYPE_CHECKING:
    from runtime import SpeculativeDecoder
    from runtime.stream import Stream

EXAMPLE = "--target out/target --drafter out/drafter --temperature 0.7"
_PROMPT = "> "
_COMMANDS = {
    "/reset": "start a new conversation",
    "/undo": "take the last message and its answer back",
    "/help": "show these lines",
    "/exit": "leave, as Ctrl-D does",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    add_decoder_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="the system message that the conversation begins with")
    add_template_arguments(parser)
    parser.add_argument(
        "--max-new-tokens", type=int, metavar="N", help="the most tokens of an answer (default: to the context's end)"
    )
    add_stop_argument(parser)
    add_sampling_arguments(parser)


def run(options: argparse.Namespace) -> None:
    """Run the command: answers go to standard output, figures and notes to standard error."""
    is_terminal = prepare_input()
    sampling, arguments = sampling_params(options), template_args(options)
    system = utf8_text(options.system, "--system") if options.system else ""
    with load_decoder(options) as decoder:
        if not (decoder.tokenizer and decoder.tokenizer.has_chat_template):
            raise VocabtrimError(
                f"{options.target} has no chat template, so it holds no conversation: `vocabtrim generate` continues "
                "a text with it"
            )
        conversation = Conversation(
            decoder,
            system,
            max_new_tokens=options.max_new_tokens if options.max_new_tokens is not None else decoder.target.capacity,
            sampling=sampling,
            stop=options.stop,
            template_args=arguments,
            chat_template=options.chat_template,
        )
        (_converse if is_terminal else _answer_lines)(conversation)


class Conversation:
    """The messages so far. What the decoder has read of them it does not read again."""

    def __init__(self, decoder: "SpeculativeDecoder", system: str, **how: Any) -> None:
        """Begin a conversation.

        Args:
            decoder: Generates the answers.
            system: The system message; "" for none.
            how: Further arguments of `SpeculativeDecoder.stream`.

        Raises:
            VocabtrimError: An argument is out of range, or the chat template refuses the first messages.
        """
        self._decoder, self._how = decoder, how
        self._first = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._first)
        self._stream: Stream | None = None  # the answer that is generated, or the last one
        self._is_stopped = False
        decoder.stream([*self._messages, {"role": "user", "content": "a"}], **how).close()

    def stop(self) -> None:
        """End the answer: after the round that runs, or after the part of the message that is being read."""
        self._is_stopped = True
        if self._stream:
            self._stream.close()

    def do(self, line: str) -> None:
        """Answer a message, or follow a command.

        Args:
            line: The line that the user typed.

        Raises:
            VocabtrimError: There is no such command, or the message cannot be answered.
        """
        text, self._is_stopped = line.strip(), False
        if not line.startswith("/"):
            if text:
                self._answer(text)
        elif text == "/reset":
            self._messages = list(self._first)
        elif text == "/undo":
            if self._messages == self._first:
                raise VocabtrimError("there is nothing to take back: this is the beginning of the conversation")
            del self._messages[-2:]
        elif text == "/help":
            print("\n".join(f"{name:<8}{what}" for name, what in _COMMANDS.items()), file=sys.stderr)
        else:
            why = f"there is no command {text.split()[0]}: /help lists them"
            raise VocabtrimError(f"{why}; a message that begins with / has a space before it")

    def _answer(self, text: str) -> None:
        messages = [*self._messages, {"role": "user", "content": text}]
        try:
            stream = self._decoder.stream(messages, **self._how)
        except ContextExceededError as error:
            context = f"the context of {self._decoder.target.capacity} tokens"
            why = f"{context} is full: /reset starts a new conversation"
            if self._messages == self._first:
                why = f"the message does not fit {context}: shorten it"
            raise VocabtrimError(why) from error
        self._stream = stream
        with stream:
            if self._is_stopped:  # while the message was encoded
                stream.close()
            printed = print_text(stream)
            ending = "stopped" if self._is_stopped else stream.finish().finish_reason
        print(figures_line(stream.stats, ending, printed.first_token_seconds), file=sys.stderr, flush=True)
        if stream.stats.tokens:  # else it was stopped while the message was read
            self._messages = [*messages, {"role": "assistant", "content": printed.text}]


def _converse(conversation: Conversation) -> None:
    """Talk with a person, until Ctrl-C or Ctrl-D at the prompt."""
    print("/help lists the commands; Ctrl-C ends an answer, Ctrl-D the conversation", file=sys.stderr, flush=True)
    while True:
        try:
            line = read_line(_PROMPT)
            if line is None or line.rstrip() == "/exit":
                return
            with _interruptible(conversation.stop):
                conversation.do(line)
        except VocabtrimError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)


def _answer_lines(conversation: Conversation) -> None:
    """Answer each line of a file or pipe."""
    while (line := read_line(None)) is not None and line.rstrip() != "/exit":
        conversation.do(line)


@contextmanager
def _interruptible(stop: Callable[[], None]) -> Iterator[None]:
    """Let a first Ctrl-C within the block call `stop`, so that the caches stay. A second one is `KeyboardInterrupt`."""

    def interrupted(*_: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
