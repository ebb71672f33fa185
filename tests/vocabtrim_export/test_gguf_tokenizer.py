"""A GGUF file's prompts become the ids that llama.cpp gives; `llama_cpp_ids.json` holds llama.cpp's own."""

import json
from dataclasses import replace

import pytest

from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError
from tests.vocabtrim_export.llama_cpp_ids import (
    APPROXIMATED,
    IDS,
    SENTENCES,
    TEXT,
    write_byte_level,
    write_sentencepiece,
)
from vocabtrim_export.sources.end_tokens import turn_end_token_ids
from vocabtrim_export.sources.gguf_header import read_header
from vocabtrim_export.sources.gguf_pre_tokenizers import BY_NAME
from vocabtrim_export.sources.gguf_tokenizer import read_tokenizer

EXPECTED = json.loads(IDS.read_text())


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """byte_level(key=value, …) → what is read of a file that says so; keys are of `tokenizer.ggml` unless dotted."""
    header = read_header(write_byte_level(tmp_path_factory.mktemp("gguf") / "model.gguf", "gpt-2"))

    def read(**fields):
        named = {key if "." in key else f"tokenizer.ggml.{key}": value for key, value in fields.items()}
        metadata = dict(header.metadata) | named
        said = {key: value for key, value in metadata.items() if value is not None}
        return read_tokenizer(replace(header, metadata=said))

    return read


@pytest.mark.parametrize("case", EXPECTED["byte_level"], ids=lambda case: case["names"][0])
def test_each_name_splits_as_llama_cpp_does(case, byte_level):
    for name in case["names"]:
        assert byte_level(pre=name).tokenizer.encode(TEXT) == case["ids"], name


def test_every_known_name_was_compared():
    compared = {name for case in EXPECTED["byte_level"] for name in case["names"]}
    assert compared | APPROXIMATED == BY_NAME.keys()


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [  # the patterns of the models' own tokenizers
        ("kimi-k2", "naïveÉcole中文ab 1234", ["naïve", "École", "中文", "ab", " ", "123", "4"]),
        ("youtu", "iPhone 한국abc 12", ["i", "Phone", " ", "한국", "abc", " ", "1", "2"]),
        ("tiny_aya", "12345 XMLHttp's", ["12", "345", " XMLHttp's"]),
        ("afmoe", "a 12345", ["a", " ", "12", "345"]),
        ("smollm", "x =   2024\n  1", ["x", " =", "   ", "2", "0", "2", "4", "\n  ", "1"]),
    ],
)
def test_pieces_are_those_of_the_models_own_tokenizers(name, text, pieces, byte_level):
    tokenizer = byte_level(pre=name).tokenizer.backend_tokenizer
    found = [text[start:end] for _, (start, end) in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert found == pieces


@pytest.mark.parametrize("flags", EXPECTED["sentencepiece"])
def test_sentencepiece_is_read_as_llama_cpp_reads_it(flags, tmp_path):
    path = write_sentencepiece(tmp_path / "model.gguf", **dict.fromkeys(flags.split(), False))
    tokenizer = read_tokenizer(read_header(path)).tokenizer
    assert [tokenizer.encode(text) for text in SENTENCES] == EXPECTED["sentencepiece"][flags]
    assert tokenizer.decode(tokenizer.encode("the 2024", add_special_tokens=False)) == "the 2024"


@pytest.mark.parametrize(
    ("pre", "said"), [(None, "names no pre-tokenizer"), ("smollm9", "'smollm9', which is not known")]
)
def test_an_unknown_way_to_split_is_a_note_that_says_what_it_costs(pre, said, byte_level):
    (note,) = byte_level(pre=pre).notes
    assert said in note
    assert "may become other tokens than the model was trained on" in note
    assert byte_level(pre="smollm").notes == ()


@pytest.mark.parametrize(
    ("pre", "flag", "begins"),
    [("qwen2", None, False), ("qwen2", True, True), ("llama-bpe", None, True), ("llama-bpe", False, False)],
)
def test_one_bos_where_the_model_has_one(pre, flag, begins, byte_level):
    tokenizer = byte_level(pre=pre, add_bos_token=flag).tokenizer
    ids = tokenizer.encode("x", add_special_tokens=True)
    assert ids.count(tokenizer.bos_token_id) == begins
    assert (ids[0] == tokenizer.bos_token_id) == begins


def test_rows_without_a_token_are_no_tokens(byte_level):
    tokens = [*byte_level().tokenizer.convert_ids_to_tokens(range(418))]
    padded = [*tokens, *(f"[PAD{row}]" for row in range(len(tokens), 448))]
    types = [1] * 416 + [3, 3] + [5] * 30
    vocab = byte_level(tokens=padded, token_type=types).tokenizer.get_vocab()
    assert set(vocab) == set(tokens)


@pytest.mark.parametrize(
    ("names", "fields", "ends"),
    [
        (["<s>", "</s>", "<|a|>"], {"eos_token_id": 418}, [417, 418]),
        (["<s>", "<e>", "<|a|>", "<|b|>"], {"eot_token_id": 418, "eom_token_id": 419}, [417, 418, 419]),
        (["<s>", "<e>", "<|im_end|>", "<end_of_turn>"], {}, [417, 418, 419]),
        (["<s>", "<|return|>", "<|end|>", "<|call|>"], {}, [417, 419]),  # gpt-oss goes on after <|end|>
    ],
)
def test_every_end_of_a_generation(names, fields, ends, byte_level):
    tokens = [*byte_level().tokenizer.convert_ids_to_tokens(range(416)), *names]
    types = [1] * 416 + [3] * len(names)
    assert byte_level(tokens=tokens, token_type=types, **fields).end_token_ids == tuple(ends)


def test_html_in_a_vocabulary_ends_nothing(byte_level):
    tokens = [*byte_level().tokenizer.convert_ids_to_tokens(range(416)), "<s>", "<e>", "</s>"]
    assert byte_level(tokens=tokens, token_type=[1] * 416 + [3, 3, 4]).end_token_ids == (417,)


@pytest.mark.parametrize(
    ("template", "ends"),
    [
        ("{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>\n{% endfor %}", ["</s>"]),
        ("{% for m in messages %}{{ m.content }} </s>{% endfor %}", ["</s>"]),
        ("{% for m in messages %}<s>{{ m.content }}{% endfor %}", []),
        ("{% for m in messages %}{{ m.content }}!</s>{% endfor %}", []),
        ("{{ raise_exception('no') }}", []),
        ("{{ strftime_now('%d') }}{% for m in messages %}{{ m.content }}</s>{% endfor %}", ["</s>"]),
        (None, []),
    ],
)
def test_what_a_template_ends_an_answer_with(template, ends, byte_level):
    tokenizer = byte_level().tokenizer
    tokenizer.chat_template = template
    assert turn_end_token_ids(tokenizer) == set(tokenizer.convert_tokens_to_ids(ends))


def test_templates_with_names_of_their_own(byte_level, tmp_path):
    """They are chosen as those of a directory are, also from the bundle."""
    key = "tokenizer.chat_template"
    assert byte_level(**{key: "D"}).tokenizer.chat_template == "D"
    tokenizer = byte_level(**{key: "D", f"{key}.tool_use": "T", f"{key}s": ["tool_use"]}).tokenizer
    assert tokenizer.chat_template == {"default": "D", "tool_use": "T"}
    tokenizer.save_pretrained(tmp_path)
    assert Tokenizer.load(tmp_path).chat.names == ("default", "tool_use")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "t5"}, "a tokenizer of the kind 't5'"),
        ({"tokens": None}, "holds no tokenizer"),
        ({"merges": ["a nothing"]}, "a damaged tokenizer"),
        ({"token_type": [1]}, "types of 1"),
        ({"model": "llama"}, "have no scores"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(fields, message, byte_level):
    with pytest.raises(VocabtrimError, match=message):
        byte_level(**fields)
