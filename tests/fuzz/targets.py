"""The readers of untrusted files, each as a function of such a file, which returns or raises `VocabtrimError`."""

import json
from pathlib import Path

from engines.bundle.chat_template import ChatTemplates
from engines.bundle.graph_file import GraphFile
from engines.bundle.manifest import FORMAT_VERSION, Manifest, _digest
from engines.bundle.vocab_map import VocabMap
from vocabtrim_export.calibration import TokenCounts, read_corpus
from vocabtrim_export.sources.weight_files import count_weights

_CHAT = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]


def manifest(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    if isinstance(data, dict):  # as somebody would who knows how the digest is made
        data.pop("digest", None)
        data["format_version"] = FORMAT_VERSION
        text = json.dumps(data | {"digest": _digest(data)})
    Manifest.from_json(text, "vocabtrim.json").to_json()


def vocab_map(path: Path) -> None:
    found = VocabMap.load(path)
    assert len(found.inverse) == found.full_vocab
    assert len(found.digest) == 64


def token_counts(path: Path) -> None:
    found = TokenCounts.load(path)
    assert found.total >= 0
    json.dumps(found.describe())
    found.resized(found.full_vocab + 64)


def graph(path: Path) -> None:
    found = GraphFile.read(path)
    found.table()
    found.digest(found.head_tensors())


def gguf(path: Path) -> None:
    assert count_weights(path) >= 0


def safetensors(path: Path) -> None:
    assert count_weights(path) >= 0


def jsonl(path: Path) -> None:
    read_corpus([path])


def records(path: Path) -> None:
    read_corpus([path])


def table(path: Path) -> None:
    read_corpus([path])


def compressed(path: Path) -> None:
    read_corpus([path])


def chat_template(path: Path) -> None:
    ChatTemplates({"default": path.read_bytes().decode("utf-8", "replace")}, {"bos_token": "<s>"}).render(_CHAT)


# name → (function, the file's name)
TARGETS = {
    "manifest": (manifest, "vocabtrim.json"),
    "vocab_map": (vocab_map, "vocab_map.safetensors"),
    "token_counts": (token_counts, "token_counts.safetensors"),
    "graph": (graph, "model.onnx"),
    "gguf": (gguf, "model.gguf"),
    "safetensors": (safetensors, "model.safetensors"),
    "jsonl": (jsonl, "prompts.jsonl"),
    "records": (records, "prompts.json"),
    "table": (table, "prompts.csv"),
    "compressed": (compressed, "prompts.jsonl.gz"),
    "chat_template": (chat_template, "chat_template.jinja"),
}
JSON = {"manifest", "records"}
JSON_LINES = {"jsonl"}
JSON_HEADER = {"vocab_map", "token_counts", "safetensors"}
