"""The README's Python blocks, run one after the other where its commands have left `out/`."""

import asyncio
import re
import shutil
from pathlib import Path

README = Path(__file__).parents[2] / "README.md"


def test_the_readmes_python_runs(random_model, export_pair, count_file, tmp_path, monkeypatch, capsys):
    model = random_model("llama")
    shutil.copytree(export_pair(model).drafter.parent, tmp_path / "out")
    shutil.copyfile(count_file(model), tmp_path / "out" / "token_counts.safetensors")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 3
    scope = {}
    for block in blocks:
        exec(block.replace('"MODEL"', repr(str(model))), scope)
    assert "stop" in (printed := capsys.readouterr().out) or "length" in printed
    with scope["SpeculativeDecoder"].load("out/target", "out/drafter") as decoder:
        wanted = decoder.generate("Hi!", max_new_tokens=64).text
        assert asyncio.run(scope["answer"](decoder, "Hi!")) == wanted
