"""The README's Python blocks and those of docs/serve.md, run one after the other where commands have left `out/`."""

import asyncio
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_readmes_python_runs(random_model, export_pair, count_file, tmp_path, monkeypatch, capsys):
    model = random_model("llama")
    shutil.copytree(export_pair(model).drafter.parent, tmp_path / "out")
    shutil.copyfile(count_file(model), tmp_path / "out" / "token_counts.safetensors")
    monkeypatch.chdir(tmp_path)
    blocks = BLOCK.findall((ROOT / "README.md").read_text())
    blocks += BLOCK.findall((ROOT / "docs" / "serve.md").read_text())[1:]  # the first one needs a server
    assert len(blocks) >= 3
    scope = {}
    for block in blocks:
        exec(block.replace('"MODEL"', repr(str(model))), scope)
    assert "stop" in (printed := capsys.readouterr().out) or "length" in printed
    with scope["SpeculativeDecoder"].load("out/target", "out/drafter") as decoder:
        wanted = decoder.generate("Hi!", max_new_tokens=64).text
        assert asyncio.run(scope["answer"](decoder, "Hi!")) == wanted
        texts = scope["answers"](decoder, "the quick brown fox", [" jumps"])
        assert texts == [decoder.generate("the quick brown fox jumps", chat=False).text]
