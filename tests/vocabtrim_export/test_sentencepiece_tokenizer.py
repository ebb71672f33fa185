"""A checkpoint with a sentencepiece model and no tokenizer.json splits text as sentencepiece does, or is refused."""

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from engines.errors import VocabtrimError
from vocabtrim_export.sources.checkpoint import read_checkpoint_tokenizer
from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer
from vocabtrim_export.sources.sentencepiece_tokenizer import follow_sentencepiece

CORPUS = Path(__file__).parents[2] / "docs" / "decisions.md"
LLAMA = {"byte_fallback": True, "split_digits": True, "normalization_rule_name": "identity"}
LLAMA |= {"remove_extra_whitespaces": False}
KINDS = {
    "bpe": {"model_type": "bpe", **LLAMA},
    "bpe without a prefix": {"model_type": "bpe", **LLAMA, "add_dummy_prefix": False},
    "bpe, normalised": {"model_type": "bpe", "byte_fallback": True},
    "unigram": {"model_type": "unigram", **LLAMA},
    "unigram, normalised": {"model_type": "unigram", "byte_fallback": True},
}
TEXTS = [
    "Hello world",
    "two  spaces   three",
    "don't 12345",
    "a\n\nb\tc",
    "na\u00efve \u4f60\u597d \U0001f642",
    "",
    "x = 1  # y",
]


@pytest.fixture(scope="module")
def sentencepiece_models(tmp_path_factory):
    place = tmp_path_factory.mktemp("sentencepiece")
    for number, settings in enumerate(KINDS.values()):
        sentencepiece.SentencePieceTrainer.train(
            input=str(CORPUS), model_prefix=str(place / str(number)), vocab_size=700, minloglevel=2, **settings
        )
    return {kind: place / f"{number}.model" for number, kind in enumerate(KINDS)}


def directory(place, model, file="tokenizer.model", model_type="llama", **config):
    shutil.copy(model, place / file)
    (place / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 700}))
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    return str(place)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(
    ("model_type", "tokenizer_class"),
    [
        ("llama", "LlamaTokenizer"),
        ("mistral", "LlamaTokenizer"),
        ("phi3", "LlamaTokenizer"),
        ("llama", "TokenizersBackend"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_text_is_split_as_sentencepiece_does(kind, model_type, tokenizer_class, legacy, sentencepiece_models, tmp_path):
    model = sentencepiece_models[kind]
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    place = directory(tmp_path, model, model_type=model_type, tokenizer_class=tokenizer_class, legacy=legacy, **names)
    tokenizer = runtime_tokenizer(read_checkpoint_tokenizer("MODEL", place))
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in [*TEXTS, *([" a", " "] if legacy else [])]:
        ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
        assert ids == processor.encode(text), text
        assert tokenizer.decode(ids) == processor.decode(ids), text
    assert tokenizer.backend.encode("a</s>b", add_special_tokens=False).ids.count(processor.eos_id()) == 1


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize(
    ("config", "has_bos"),
    [
        (None, True),
        ({}, True),
        ({"tokenizer_class": "LlamaTokenizer"}, True),
        ({"tokenizer_class": "GemmaTokenizerFast"}, True),
        ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, False),
        ({"add_bos_token": False}, False),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": None}, False),
        ({"tokenizer_class": "OwnTokenizer"}, False),
    ],
)
def test_a_text_begins_with_the_bos_that_its_class_adds_by_default(
    config, has_bos, model_type, sentencepiece_models, tmp_path
):
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    place = directory(tmp_path, sentencepiece_models["bpe"], model_type=model_type, **names | (config or {}))
    if config is None:
        (tmp_path / "tokenizer_config.json").unlink()
    tokenizer = read_checkpoint_tokenizer("MODEL", place)
    assert tokenizer.backend_tokenizer.encode("Hello").tokens[0] == (tokenizer.bos_token if has_bos else "\u2581")
    assert tokenizer.backend_tokenizer.encode("Hello").tokens[1:3] != [tokenizer.bos_token] * 2


def test_ids_that_are_not_the_models_own_are_refused(sentencepiece_models, tmp_path):
    model = sentencepiece_models["bpe"]
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    shifted = {processor.id_to_piece(number): number + 1 for number in range(processor.get_piece_size())}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE(shifted, [], unk_token="<unk>")))
    tokenizer.vocab_file = str(model)
    with pytest.raises(VocabtrimError, match=r"\.model splits text in another way .* tokenizer.json"):
        follow_sentencepiece("MODEL", str(tmp_path), tokenizer)


@pytest.mark.parametrize(
    ("tokenizer_class", "files"),
    [("LlamaTokenizer", ()), ("Qwen2Tokenizer", ()), ("LlamaTokenizer", ("vocab.json", "merges.txt"))],
)
def test_a_tokenizer_without_its_files_is_refused(tokenizer_class, files, tmp_path):
    for file in files:
        (tmp_path / file).write_text(json.dumps({"a": 0, "b": 1, "ab": 2}) if file == "vocab.json" else "a b\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 700}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    with pytest.raises(VocabtrimError, match="has no tokens but special ones: its files are missing"):
        read_checkpoint_tokenizer("MODEL", str(tmp_path))
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(VocabtrimError, match="there is no file of one that transformers can read; fetch"):
        read_checkpoint_tokenizer("MODEL", str(tmp_path))


def test_a_model_that_sentencepiece_cannot_open_is_one_line(tmp_path):
    file, tokenizer = tmp_path / "tokenizer.model", PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()))
    tokenizer.vocab_file = str(file)
    piece = b"\n\x06<0x00>\x15\0\0\0\0\x18\x06"  # a byte, in a model that does not say byte_fallback
    file.write_bytes(b"\n" + bytes([len(piece)]) + piece)
    with pytest.raises(
        VocabtrimError, match=r"MODEL has no tokenizer\.json, and sentencepiece cannot open .*: put the"
    ):
        follow_sentencepiece("MODEL", str(tmp_path), tokenizer)
