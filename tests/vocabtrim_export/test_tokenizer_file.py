"""A tokenizer.json is followed whatever class tokenizer_config.json names."""

import json

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from vocabtrim_export.sources.checkpoint import read_checkpoint_tokenizer

TEXTS = ["in 2023, 650841823 people", "don't  do\n\nthat", "", " a", "<s>x</s> y", "na\u00efve"]
SPECIAL = ["<unk>", "<s>", "</s>"]


def byte_level(pre_tokenizer, **settings):
    backend = Tokenizer(models.BPE(**settings))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizer, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece_like():
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return backend


BACKENDS = {
    "digits": lambda: byte_level(
        pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.Split(Regex(r" ?\p{L}+"), "isolated")])
    ),
    "triples": lambda: byte_level(pre_tokenizers.Split(Regex(r"\p{N}{1,3}| ?\p{L}+|\s+"), "isolated")),
    "prepend": sentencepiece_like,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "tokenizer_class",
    ["GPT2Tokenizer", "Qwen2TokenizerFast", "LlamaTokenizerFast", "GemmaTokenizer", "GPTNeoXTokenizer", None],
)
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_text_is_split_as_the_file_says(backend, tokenizer_class, model_type, tmp_path):
    stated = BACKENDS[backend]()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    numbers = [f"{number} people in {number * 7}" for number in range(1900, 2100)]
    stated.train_from_iterator(
        [*numbers, "don't do that", "naive"],
        trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False),
    )
    stated.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    stated.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    stated.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 500}))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    described = names if tokenizer_class is None else names | {"tokenizer_class": tokenizer_class}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(described))
    tokenizer = read_checkpoint_tokenizer("MODEL", str(tmp_path))
    for text in TEXTS:
        wanted = stated.encode(text, add_special_tokens=False).ids
        assert tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids == wanted, text
        assert tokenizer.backend_tokenizer.decode(wanted) == stated.decode(wanted), text
    assert tokenizer.backend_tokenizer.encode("a").ids == stated.encode("a").ids
