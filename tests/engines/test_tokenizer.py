import json
import random

import pytest
import tokenizers

from engines.bundle.tokenizer import Tokenizer, tokenizer_digest
from engines.errors import VocabtrimError

TEMPLATE = """{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'bad' %}{{ raise_exception('no role ' + m.role) }}{% endif %}
    {%- if m.role == 'skip' %}{% continue %}{% endif %}
    {%- generation %}[{{ m.role }}]{{ m.content | tojson }}{% endgeneration %}
{%- endfor %}
{%- if add_generation_prompt %}[assistant]{% endif %}"""


def make_backend(*, prefix=""):
    """Byte-level, every byte a token, so that any text survives; BOS in front of plain text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {prefix + letter: i for i, letter in enumerate(alphabet)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    return backend


@pytest.fixture
def bundle(tmp_path):
    make_backend().save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "model_max_length": 8}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def test_other_threads_run_while_a_long_text_is_encoded(bundle):
    import threading

    tokenizer, done, ticks = Tokenizer.load(bundle), threading.Event(), []

    def tick():
        while not done.wait(0.005):
            ticks.append(1)

    thread = threading.Thread(target=tick)
    thread.start()
    ids = tokenizer.encode("größer " * 100_000)
    done.set()
    thread.join()
    assert ids == [256, *(100_000 * tokenizer.encode("größer ")[1:])]
    assert len(ticks) > 5


def test_plain_text_gets_the_special_tokens_and_decoding_drops_them(bundle):
    tokenizer = Tokenizer.load(bundle)
    ids = tokenizer.encode("héllo")
    assert (ids[0], len(ids)) == (256, 7)
    assert tokenizer.decode([*ids, 257]) == "héllo"


def test_a_saved_truncation_or_padding_does_not_touch_prompts(bundle):
    backend = make_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.save(str(bundle / "tokenizer.json"))
    assert len(Tokenizer.load(bundle).encode("a" * 20)) == 21


@pytest.mark.parametrize("splits", [True, False])
def test_special_tokens_within_a_text_are_split_where_the_config_says_so(splits, bundle):
    from transformers import PreTrainedTokenizerFast

    from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer

    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "split_special_tokens": splits}
    (bundle / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = PreTrainedTokenizerFast.from_pretrained(bundle)
    wanted = theirs("a</s>b").input_ids
    assert (257 in wanted) != splits
    assert Tokenizer.load(bundle).encode("a</s>b") == wanted
    assert runtime_tokenizer(theirs).encode("a</s>b") == wanted
    theirs.save_pretrained(bundle / "saved")
    assert Tokenizer.load(bundle / "saved").encode("a</s>b") == wanted


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json", "named"])
def test_a_chat_goes_through_the_template_as_in_transformers(bundle, where):
    if where != "chat_template.jinja":
        (bundle / "chat_template.jinja").unlink()
        template = [{"name": "default", "template": TEMPLATE}] if where == "named" else TEMPLATE
        (bundle / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": template}))
    tokenizer = Tokenizer.load(bundle)
    ids = tokenizer.encode_chat([{"role": "user", "content": "a<é"}, {"role": "skip", "content": "b"}])
    assert (ids[0], ids.count(256)) == (256, 1)  # written by the template alone
    assert tokenizer.decode(ids) == '[user]"a<é"[assistant]'
    assert tokenizer.has_chat_template


def test_templates_in_files_of_their_own_come_first(bundle):
    config = {"chat_template": [{"name": name, "template": "config"} for name in ("default", "rag")]}
    (bundle / "tokenizer_config.json").write_text(json.dumps(config))
    assert Tokenizer.load(bundle).chat.names == ("default",)
    (bundle / "additional_chat_templates").mkdir()
    (bundle / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert Tokenizer.load(bundle).chat.names == ("default", "tool_use")
    (bundle / "additional_chat_templates" / "tool_use.jinja").unlink()
    (bundle / "chat_template.jinja").unlink()
    assert Tokenizer.load(bundle).chat.names == ("default", "rag")


def test_special_tokens_of_a_models_own_are_variables_of_the_template(bundle):
    config = {"bos_token": {"content": "<s>"}, "image_token": "<i>", "extra_special_tokens": {"call_token": "<c>"}}
    (bundle / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": True, "pad_token": None}))
    (bundle / "chat_template.jinja").write_text("{{ bos_token ~ image_token ~ call_token ~ pad_token }}")
    assert Tokenizer.load(bundle).chat.render([{"role": "user", "content": ""}]) == "<s><i><c>"


def test_a_template_that_refuses_is_one_line(bundle):
    with pytest.raises(VocabtrimError, match="refused the messages: no role bad"):
        Tokenizer.load(bundle).encode_chat([{"role": "bad", "content": ""}])
    (bundle / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(VocabtrimError, match="does not parse"):
        Tokenizer.load(bundle)
    (bundle / "chat_template.jinja").unlink()
    with pytest.raises(VocabtrimError, match="no chat template"):
        Tokenizer.load(bundle).encode_chat([{"role": "user", "content": ""}])


def test_a_template_cannot_reach_out_of_its_sandbox(bundle):
    (bundle / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}")
    with pytest.raises(VocabtrimError, match="refused"):
        Tokenizer.load(bundle).encode_chat([{"role": "user", "content": ""}])


@pytest.mark.parametrize("text", ["plain", "né 你好 🙂 end", ""])
def test_streamed_pieces_join_to_the_text_and_never_split_a_character(bundle, text):
    tokenizer = Tokenizer.load(bundle)
    stream = tokenizer.stream()
    pieces = [stream.push(token) for token in [*tokenizer.encode(text), 257]]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert stream.finish() == ""


def words_backend(kind):
    """Tokens that are words, some of them with a mark of the space before them or of none."""
    words = [*".?!,'nsv", "n't", "'m", "'s", "'ve", "'re", "'", "re", "never", "is", "##n", "##'", "▁'", "▁.", "▁s"]
    words = list(dict.fromkeys(words))
    table = {word: i for i, word in enumerate(words)}
    model = {
        "WordPiece": lambda: tokenizers.models.WordPiece(table, unk_token="is"),
        "Unigram": lambda: tokenizers.models.Unigram([(word, -1.0) for word in words], unk_id=0),
        "BPE": lambda: tokenizers.models.BPE(table, []),
    }[kind]()
    backend = tokenizers.Tokenizer(model)
    decoders = tokenizers.decoders
    backend.decoder = decoders.WordPiece(cleanup=False) if kind == "WordPiece" else decoders.Metaspace()
    return backend, len(words)


@pytest.mark.parametrize("cleans_up", [True, False])
@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "BPE"])
def test_spaces_are_cleaned_up_as_in_transformers_at_once_and_in_a_stream(kind, cleans_up, tmp_path):
    from transformers import PreTrainedTokenizerFast

    from vocabtrim_export.sources.runtime_tokenizer import runtime_tokenizer

    backend, size = words_backend(kind)
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=cleans_up)
    theirs.save_pretrained(tmp_path)
    draw, changed = random.Random(0), 0
    for tokenizer in (Tokenizer.load(tmp_path), runtime_tokenizer(theirs)):
        for _ in range(300):
            ids = [draw.randrange(size) for _ in range(draw.randrange(12))]
            stream = tokenizer.stream()
            text = "".join(map(stream.push, ids)) + stream.finish()
            assert text == tokenizer.decode(ids) == theirs.decode(ids)
            changed += text != tokenizer.backend.decode(ids)
    assert (changed > 100) == (cleans_up and kind != "BPE")


def test_an_unfinished_character_comes_out_at_the_end(bundle):
    tokenizer = Tokenizer.load(bundle)
    stream = tokenizer.stream()
    ids = tokenizer.encode("a🙂")[:-1]
    assert "".join(map(stream.push, ids)) == "a"
    assert "a" + stream.finish() == stream.text == tokenizer.decode(ids) == "a\ufffd"


def test_byte_fallback_that_rewrites_the_past_does_not_stop_the_stream():
    """Two bytes make é; a third, invalid, turns the whole run to U+FFFD when decoded at once."""
    bytes_ = {f"<0x{i:02X}>": i for i in range(256)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(bytes_, [], byte_fallback=True))
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    stream = Tokenizer(backend, {}, None).stream()
    text = "".join(stream.push(byte) for byte in [0xC3, 0xA9, 0xFF, 0x41]) + stream.finish()
    assert text == stream.text
    assert text.startswith("é")


def test_the_bytes_of_each_token_are_those_of_the_text(bundle):
    """Also where a character has several tokens, or a decoder takes a space from the beginning of a text."""
    decoders, tokenizer = tokenizers.decoders, Tokenizer.load(bundle)
    text = " é🙂\ufffd</s>"
    ids = tokenizer.backend.encode(text, add_special_tokens=False).ids
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"▁the": 256}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    tokenizer = Tokenizer(backend, {}, None)
    assert [tokenizer.token_text(256), tokenizer.token_bytes(0xC3), tokenizer.token_bytes(0x41)] == [
        " the",
        b"\xc3",
        b"A",
    ]


def test_the_digest_is_of_the_token_table_alone(bundle):
    digest = Tokenizer.load(bundle).digest
    backend = make_backend()
    assert digest == tokenizer_digest(backend)
    backend.post_processor = None
    assert digest == tokenizer_digest(backend)
    backend.add_tokens(["more"])
    assert digest != tokenizer_digest(backend)
    assert digest != tokenizer_digest(make_backend(prefix="x"))


def test_files_that_are_missing_or_malformed_are_named(bundle):
    (bundle / "tokenizer_config.json").write_text("{")
    with pytest.raises(VocabtrimError, match=r"tokenizer_config\.json is not JSON"):
        Tokenizer.load(bundle)
    for text in ("{}", "[" * 200, '{"model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}'):
        (bundle / "tokenizer.json").write_text(text)
        with pytest.raises(VocabtrimError, match=r"tokenizer\.json is not a tokenizer"):
            Tokenizer.load(bundle)
    (bundle / "tokenizer.json").unlink()
    with pytest.raises(VocabtrimError, match=r"has no tokenizer\.json"):
        Tokenizer.load(bundle)


def test_text_that_the_library_cannot_encode_is_one_line():
    no_unknown = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="?"))
    tokenizer = Tokenizer(no_unknown, {}, "{{ messages[0].content }}")
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_chat([{"role": "user", "content": text}])):
        assert encode("a") == [0]
        with pytest.raises(VocabtrimError, match="cannot encode this text"):
            encode("b")
        with pytest.raises(VocabtrimError, match="character 1 is half of a surrogate pair"):
            encode("a\ud83d")
