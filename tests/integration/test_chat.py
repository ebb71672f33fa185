"""`vocabtrim chat`: a conversation by hand on a terminal, and by lines through a pipe."""

import io
import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from runtime import SamplingParams, SpeculativeDecoder
from vocabtrim_export.cli.main import main

ROOT = Path(__file__).parents[2]
SLOW = """
import sys, time
from runtime.stream import Stream
from vocabtrim_export.cli.main import main
from engines.ort import engine
from engines.ort.step import HostStep
step, run = Stream.__next__, HostStep.run
engine.CHUNK = 16
def slow(this, end):
    if this.input_ids.shape[1] == engine.CHUNK:
        print("(reading)", file=sys.stderr, flush=True)
        time.sleep(0.5)
    run(this, end)
HostStep.run = slow
Stream.__next__ = lambda stream: time.sleep(0.03) or step(stream)  # as a large model is
sys.exit(main())
"""


@pytest.fixture
def chat(pair, monkeypatch, capsys):
    """chat(input bytes, options…) → exit code, standard output, standard error."""

    def run(data, *options):
        monkeypatch.setattr(sys, "stdin", data and io.TextIOWrapper(io.BytesIO(data), "ascii"))
        code = main(["chat", "--target", str(pair.target), "--drafter", str(pair.drafter), *options])
        return code, *capsys.readouterr()

    return run


class Terminal:
    """A program on a terminal of its own, which shows ASCII."""

    def __init__(self, *arguments, kind="dumb"):
        self._master, slave = pty.openpty()
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "TERM": kind,
            "PYTHONIOENCODING": "ascii",
            "COLUMNS": "999",
        }
        with os.fdopen(slave, "w") as terminal:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                **{"stdin": terminal, "stdout": terminal, "stderr": terminal},
                env=environment,
                start_new_session=True,
                # the terminal's own Ctrl-C needs a session that it controls
                preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
            )
        self._read = b""

    @property
    def shown(self):
        """The output so far; a read may end within a character."""
        return self._read.decode("utf-8", "replace").replace("\r\n", "\n")

    def type(self, text):
        os.write(self._master, text.encode())

    def wait_for(self, text, times=1):
        """Read until `text` was shown so many times since the beginning."""
        while self.shown.count(text) < times:
            assert select.select([self._master], [], [], 30)[0], f"{text!r} is not shown: {self.shown}"
            try:
                self._read += os.read(self._master, 4096)
            except OSError:
                raise AssertionError(f"{text!r} was not shown: {self.shown}") from None

    def leave_with(self, key):
        """Type a key until the process ends: Python's `input` misses a signal that comes before it waits."""
        for _ in range(20):
            self.type(key)
            with suppress(subprocess.TimeoutExpired):
                return self.process.wait(1)
        raise AssertionError(f"{key!r} does not end it: {self.shown}")

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(pair):
    opened = []

    def start(*options, kind="dumb"):
        arguments = ["chat", "--target", pair.target, "--drafter", pair.drafter, *options]
        opened.append(Terminal("-c", SLOW, *arguments, kind=kind))
        opened[-1].wait_for("> ")
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def conversation(decoder, lines, **how):
    """Returns what `chat` must print: the answers of a decoder that reads all messages anew."""
    messages, printed = [], ""
    for line in lines:
        messages.append({"role": "user", "content": line})
        with decoder.fork() as fresh:
            text = fresh.generate(messages, **how).text
        messages.append({"role": "assistant", "content": text})
        printed += text + "\n"
    return printed


@pytest.fixture(scope="module")
def decoder(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:
        yield decoder


def test_lines_of_a_pipe_are_turns_of_one_conversation(chat, decoder):
    lines = ["the fox", "größer", "and the dog"]
    code, out, err = chat("\ufeffthe fox\n\ngrößer\r\nand the dog".encode(), "--max-new-tokens", "9")
    assert (code, out) == (0, conversation(decoder, lines, max_new_tokens=9))
    assert err.count("tokens/s, first token after ") == 3
    options = ["--temperature", "0.9", "--seed", "3", "--max-new-tokens", "9"]
    sampled = conversation(decoder, lines[:1], max_new_tokens=9, sampling=SamplingParams(0.9, seed=3))
    assert chat(b"the fox\n/exit\nthe dog\n", *options)[1] == sampled


def test_commands_take_back_and_begin_anew(chat, decoder):
    once = conversation(decoder, ["the fox"], max_new_tokens=5)
    twice = conversation(decoder, ["the fox", "the dog"], max_new_tokens=5)
    assert twice.removeprefix(once) != conversation(decoder, ["the dog"], max_new_tokens=5)
    typed = b"the fox\nthe quick\n/undo\nthe dog\n/reset\nthe fox\n/help\n"
    code, out, err = chat(typed, "--max-new-tokens", "5")
    between = conversation(decoder, ["the fox", "the quick"], max_new_tokens=5)
    assert (code, out) == (0, between + twice.removeprefix(once) + once)
    assert "/undo" in err
    with decoder.fork() as fresh:
        told = fresh.generate([{"role": "system", "content": "of"}, {"role": "user", "content": "a"}], max_new_tokens=5)
    assert chat(b" /etc/passwd\n", "--max-new-tokens", "5")[1] == conversation(
        decoder, ["/etc/passwd"], max_new_tokens=5
    )
    assert chat(b"b\n/reset\na\n", "--max-new-tokens", "5", "--system", "of")[1].endswith(f"\n{told.text}\n")


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (b"the fox\n" * 30, ["--max-new-tokens", "4"], "the context of 128 tokens is full: /reset starts a new"),
        (b"the fox" * 99, [], "the message does not fit the context of 128 tokens: shorten it"),
        ("café\n".encode("latin1"), [], "standard input is not UTF-8 (byte 0xe9 at position 3): convert it"),
        (None, [], "standard input is closed"),
        (b"/etc/passwd\n", [], "there is no command /etc/passwd: /help lists them"),
        (b"/undo\n", [], "there is nothing to take back"),
        (b"a\n", ["--temperature", "-1"], "temperature"),
        (b"a\n", ["--stop", ""], "a stop string is empty"),
        (b"a\n", ["--logit-bias", "9999=1"], "9999"),
        (b"a\n", ["--chat-template", "other"], "no chat template is named other"),
        (b"a\n", ["--system", os.fsdecode(b"caf\xe9")], "--system is not UTF-8"),
    ],
)
def test_a_mistake_is_one_line(chat, data, options, message):
    code, _, err = chat(data, *options)
    assert code == 2
    (line,) = [each for each in err.splitlines() if "tokens/s" not in each]
    assert line.startswith("error: ")
    assert message in line


def test_a_model_without_a_chat_template_is_refused_at_once(pair, tmp_path, chat, monkeypatch):
    from engines.bundle.chat_template import ChatTemplates

    monkeypatch.setattr(ChatTemplates, "names", ())
    code, out, err = chat(b"a\n")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "has no chat template" in err


def test_a_reader_that_has_gone_is_no_error(pair):
    running = subprocess.Popen(
        [sys.executable, "-m", "vocabtrim_export.cli.main", "chat", "--target", pair.target],
        **dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    running.stdout.close()
    running.stdin.write(b"the fox\n")
    running.stdin.close()
    assert (running.stderr.read(), running.wait(60)) == (b"", 141)


def test_ctrl_c_ends_an_answer_and_keeps_the_conversation(terminal):
    screen = terminal("--logit-bias", "1=-100")  # no EOS: the answers go on to the context's end
    screen.type("the quick brown fox\n")
    screen.wait_for("brown fox\n")
    screen.wait_for("", len(screen.shown) + 9)  # some characters of the answer
    screen.type("\x03")
    screen.wait_for("\n> ", 2)
    assert ", stopped; " in screen.shown
    screen.type("/nothing\n")
    screen.wait_for("error: there is no command /nothing")
    screen.wait_for("\n> ", 3)
    screen.type("and the lazy dog\n")
    screen.wait_for(", length; ")
    screen.wait_for(" tokens of the prompt were in the cache")
    screen.wait_for("\n> ", 4)
    screen.type("again\n")
    screen.wait_for("is full: /reset starts a new")
    screen.wait_for("\n> ", 5)
    screen.type("/reset\n")
    screen.wait_for("\n> ", 6)
    screen.type("\x04")
    assert screen.process.wait(20) == 0


def test_ctrl_c_while_a_message_is_read_takes_it_back(terminal):
    screen = terminal("--max-new-tokens", "3")
    for times in (1, 2):
        screen.type("the quick brown fox jumps over the lazy dog " * 4 + "\n")
        if times == 1:
            screen.wait_for("(reading)")
            screen.type("\x03")
            screen.wait_for("[0 tokens, stopped; ")
            screen.wait_for("\n> ", 2)
    screen.wait_for("[3 tokens, length; ")
    screen.type("/undo\n/undo\n")
    screen.wait_for("there is nothing to take back")


def test_lines_that_are_pasted_together_are_one_message(terminal):
    pytest.importorskip("readline")
    screen = terminal("--max-new-tokens", "3", kind="xterm")
    screen.type("\x1b[200~the fox\nthe dog\x1b[201~\n")
    screen.wait_for("[3 tokens, length; ")
    screen.type("/undo\n/undo\n")
    screen.wait_for("there is nothing to take back")
    assert screen.shown.count("[3 tokens, length; ") == 1


def test_ctrl_c_at_the_prompt_leaves_and_sigterm_ends_an_answer(terminal):
    screen = terminal("--max-new-tokens", "9")
    screen.type("größer\n")
    screen.wait_for("[9 tokens, length; ")
    screen.wait_for("\n> ", 2)
    assert screen.shown.replace("größer", "").isascii()
    screen.type("half a line")
    screen.wait_for("half a line")
    assert screen.leave_with("\x03") == 0
    screen = terminal("--logit-bias", "1=-100")
    screen.type("the fox\n")
    screen.wait_for("the fox\n")
    screen.wait_for("", len(screen.shown) + 9)  # some characters of the answer
    screen.process.send_signal(signal.SIGTERM)
    screen.wait_for("interrupted")
    assert screen.process.wait(20) == 130
