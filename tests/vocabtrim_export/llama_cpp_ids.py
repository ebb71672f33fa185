"""Vocabularies in small `.gguf` files, and the ids that llama.cpp gives for a text with each of them.

The ids lie in `llama_cpp_ids.json`. To make them again, in an environment with llama-cpp-python (built from source) and
gguf: `python -m tests.vocabtrim_export.llama_cpp_ids`.
"""

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import gguf

IDS = Path(__file__).with_suffix(".json")
TEXT = (
    "x =   2024\n  1 It's 12345678 o'clock; WE'LL don't   STOP.\n\n\n\tdef f(x):\n        return x**2  # 3.14159\r\n"
    "Привет, Мир! 中文字符和English混合,价格12345元。カタカナ! 한국어 문장 123 مرحبا، ١٢٣ XMLHttpRequest "
    "a  b   c\t\te \n f\n\n $100 + <tag>~^|` = {x}[y] a/b http://e.com/p?q=1&r=2 ...!!!---_ 0 00 000 1,234.5 ½ \u00a0n "
)
# llama.cpp only approximates what the tokenizers of these models do: with words of capital and small letters, and with
# numbers, whose first digits it leaves to what stands before them.
APPROXIMATED = frozenset({"kimi-k2", "youtu", "tiny_aya", "cohere2moe", "afmoe"})
_WORDS = ("the", "th", "he", "t", "a", "an", "and", "20", "2024", "24")
_PARTS = ("the", "th", "he", "t", "h", "e", "a", "n", "d", "2", "0", "4", "an", "nd", "\u2581", "\u2581\u2581")
PIECES = [*(f"\u2581{word}" for word in _WORDS), *_PARTS]  # those of a higher score first
SENTENCES = ["the 2024 and  a", " the", "", "a<s>the é</s>"]


def byte_level_vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges that were learned across words, numbers and signs: where a text is split shows in its ids."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in shown}
    letters |= {byte: chr(256 + index) for index, byte in enumerate(byte for byte in range(256) if byte not in letters)}
    tokens, merges = [letters[byte] for byte in range(256)], []
    text = [letters[byte] for byte in TEXT.encode()]
    while len(merges) < 160:
        pair = Counter(pairwise(text)).most_common(1)[0][0]
        merges.append(" ".join(pair))
        tokens.append("".join(pair))
        merged, at = [], 0
        while at < len(text):
            both = tuple(text[at : at + 2]) == pair
            merged.append("".join(pair) if both else text[at])
            at += 2 if both else 1
        text = merged
    return tokens, merges


def write_byte_level(path: Path, pre: str | None, specials: tuple[str, ...] = ("<s>", "</s>")) -> Path:
    """A file of a byte-level vocabulary alone, whose special tokens come last, <s> and </s> for begin and end."""
    tokens, merges = byte_level_vocabulary()
    writer = _writer(path)
    writer.add_tokenizer_model("gpt2")
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *specials])
    writer.add_token_types([1] * len(tokens) + [3] * len(specials))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(len(tokens))
    writer.add_eos_token_id(len(tokens) + 1)
    return _finish(writer, path)


def write_sentencepiece(path: Path, **flags: bool) -> Path:
    """flags: add_space_prefix, add_bos_token."""
    special = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    rows = special + [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    rows += [(piece, -float(rank), 1) for rank, piece in enumerate(PIECES, 1)]
    writer = _writer(path)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([piece for piece, _, _ in rows])
    writer.add_token_scores([score for _, score, _ in rows])
    writer.add_token_types([kind for _, _, kind in rows])
    for name, value in flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    return _finish(writer, path)


def _writer(path: Path) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    return writer


def _finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def main() -> None:
    import sys
    from tempfile import TemporaryDirectory

    from llama_cpp import Llama

    names = sys.argv[1:]
    found: dict[str, list[str]] = {}
    with TemporaryDirectory() as directory:
        path = Path(directory) / "vocabulary.gguf"
        for name in names:
            model = Llama(str(write_byte_level(path, name)), vocab_only=True, verbose=False)
            found.setdefault(json.dumps(model.tokenize(TEXT.encode(), add_bos=True, special=True)), []).append(name)
        pieces = {}
        for flags in ({}, {"add_space_prefix": False}, {"add_bos_token": False}):
            model = Llama(str(write_sentencepiece(path, **flags)), vocab_only=True, verbose=False)
            ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in SENTENCES]
            pieces[" ".join(flags)] = ids
    byte_level = [{"names": names, "ids": json.loads(ids)} for ids, names in found.items()]
    IDS.write_text(json.dumps({"byte_level": byte_level, "sentencepiece": pieces}) + "\n")


if __name__ == "__main__":
    main()
