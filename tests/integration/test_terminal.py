"""The commands on terminals, in pipes and with input as shells give them: a result or one clear line."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from runtime import SpeculativeDecoder
from vocabtrim_export import __version__
from vocabtrim_export.cli.main import export_main, main

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def bundle(pair):
    return pair.target


@pytest.fixture
def standard_input(monkeypatch):
    def give(data: bytes | None):
        stream = None if data is None else io.TextIOWrapper(io.BytesIO(data), "utf-8")
        monkeypatch.setattr(sys, "stdin", stream)

    return give


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "vocabtrim_export.cli.main", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


@pytest.mark.parametrize("command", ["generate", "inspect", "--help"])
def test_a_reader_that_has_gone_is_no_error(command, bundle):
    """A pipe into `head` closes before the first character or with the last one."""
    generated = ["--target", bundle, "--prompt", "the fox", "--max-new-tokens", "90"]
    options = {"generate": generated, "inspect": [bundle]}.get(command, [])
    running = start(command, *options, PYTHONUNBUFFERED="")  # else argparse itself passes over the error
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait(60) == 141


def test_an_ascii_terminal_shows_what_it_can(bundle):
    options = ["--target", bundle, "--prompt", "the fox", "--max-new-tokens", "40"]
    out, err = start("generate", *options, PYTHONIOENCODING="ascii").communicate(timeout=60)
    assert b"tokens/s" in err
    with SpeculativeDecoder.load(bundle) as decoder:
        text = decoder.generate("the fox", max_new_tokens=40).text
    assert not text.isascii()
    assert out.splitlines() == (text + "\n").encode("ascii", "replace").splitlines()


def test_what_is_not_read_of_a_request_is_named(bundle, tmp_path, capsys):
    request = {"messages": [{"role": "user", "content": "the fox"}], "model": "m", "temperature": 0.5, "n": 2}
    (tmp_path / "body.json").write_text(json.dumps(request))
    options = ["--target", str(bundle), "--max-new-tokens", "2"]
    assert main(["generate", *options, "--messages", str(tmp_path / "body.json")]) == 0
    assert "body.json: n, temperature; give options instead" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("café".encode("latin1"), [], "standard input is not UTF-8 (byte 0xe9 at position 3): convert it"),
        (b" \n", [], "the prompt is empty: standard input holds no text"),
        (None, [], "standard input is closed: give --prompt"),
        (b"", ["--prompt", ""], "the prompt is empty: --prompt holds no text"),
        (b"", ["--prompt", os.fsdecode(b"caf\xe9")], "--prompt is not UTF-8 (byte 0xe9 at position 3)"),
    ],
)
def test_input_that_is_no_prompt_is_one_line(bundle, standard_input, data, options, message, capsys):
    standard_input(data)
    assert main(["generate", "--target", str(bundle), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_standard_input_is_utf8_with_or_without_a_mark(bundle, standard_input, capsys):
    options = ["generate", "--target", str(bundle), "--max-new-tokens", "9"]
    assert main([*options, "--prompt", "größer"]) == 0
    wanted = capsys.readouterr().out
    for data in ("größer".encode(), "größer".encode("utf-8-sig")):
        standard_input(data)
        assert main(options) == 0
        assert capsys.readouterr().out == wanted


@pytest.mark.parametrize("command", [main, export_main, lambda _: main(["generate", "--version"])])
def test_version(command, capsys):
    with pytest.raises(SystemExit, match="0"):
        command(["--version"])
    assert capsys.readouterr().out == f"vocabtrim-export {__version__}\n"
