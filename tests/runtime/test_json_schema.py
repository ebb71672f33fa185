"""The tokens that a JSON schema allows, and generations under schemas on real engines."""

import json
import sys
import time
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import tokenizers

from engines.bundle.tokenizer import Tokenizer
from engines.errors import VocabtrimError
from runtime import SamplingParams, SpeculativeDecoder
from runtime.json_schema import MOST_BYTES, JsonSchemas
from tests.runtime.conftest import make_manifest

jsonschema = pytest.importorskip("jsonschema")
pytest.importorskip("llguidance")

EOS = 1
BLANKS = ["", " ", *("\n" + " " * count for count in range(6))]  # to 40
SPACED = [f"[{before}7{behind}]" for before in BLANKS for behind in BLANKS]
# A finite language each, written out by hand.
LANGUAGES = {
    "strings": ({"enum": ["the", "the fox", "them", "dog"]}, ['"the"', '"the fox"', '"them"', '"dog"']),
    "values": ({"enum": [1, 12, 120, True, None, "1"]}, ["1", "12", "120", "true", "null", '"1"']),
    "pattern": (
        {"type": "string", "pattern": "^(qu|fo)x{1,2}$"},
        ['"qux"', '"quxx"', '"fox"', '"foxx"'],
    ),
    "items": ({"type": "array", "items": {"const": 7}, "minItems": 1, "maxItems": 1}, SPACED),
}


@pytest.fixture(scope="module")
def backend(tokenizer):
    return tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())


@pytest.fixture(scope="module")
def schemas(backend):
    return JsonSchemas(Tokenizer(backend, {}, None), make_manifest(head_rows=448))


def texts(backend):
    """The text of each ordinary token, "" for the others."""
    added = backend.get_added_tokens_decoder()
    size = backend.get_vocab_size(with_added_tokens=True)
    return ["" if token in added else backend.decode([token]) for token in range(size)]


@pytest.mark.parametrize("name", LANGUAGES)
def test_a_mask_allows_what_can_still_become_a_text_of_the_language(name, schemas, backend):
    """Computed by hand in every state that tokens can reach; an EOS exactly where a text of the language has ended.

    Where only one text is left, llguidance allows the tokens with which the tokenizer would write it, no shorter ones.
    """
    schema, language = LANGUAGES[name]
    tokens, seen, stack = texts(backend), set(), [()]
    while stack:
        path = stack.pop()
        text = "".join(tokens[token] for token in path)
        if text in seen or text.count(" ") > 2:
            continue
        seen.add(text)
        wanted = {
            token
            for token, piece in enumerate(tokens)
            if piece and any(whole.startswith(text + piece) for whole in language)
        }
        wanted |= {EOS} if text in language else set()
        constraint = schemas.constraint(schema)
        for token in path:
            constraint.advance(token)
        allowed = set(np.flatnonzero(constraint.allowed()).tolist())
        allowed -= {token for token in allowed if "\t" in tokens[token]}  # indents as a blank does
        left = [whole for whole in language if whole.startswith(text)]
        if len(left) == 1 and text not in left:
            assert allowed, text
            assert allowed <= wanted, text
        else:
            assert allowed == wanted, text
        stack += [(*path, token) for token in wanted - {EOS}]
    assert {text for text in language if text.count(" ") < 3} <= seen


def test_rewinding_restores_the_state(schemas, backend):
    """Behind the end of the JSON too, and whatever came after an EOS."""
    ids = [*backend.encode('{"a": [1, 2]}', add_special_tokens=False).ids, EOS, EOS, 5]
    constraint, masks = schemas.constraint({"type": "object"}), []
    for token in ids:
        masks.append(constraint.allowed())
        constraint.advance(token)
    for count in range(1, len(ids) + 1):
        constraint.rewind(count)
        for position in range(len(ids) - count, len(ids)):
            np.testing.assert_array_equal(constraint.allowed(), masks[position])
            constraint.advance(ids[position])
    assert masks[-1][EOS]  # never empty: the verdict on a draft that ended asks for one more token
    constraint.rewind(len(ids))
    assert constraint.fitting(ids[:-2]) == len(ids) - 2
    assert constraint.fitting([ids[0], ids[0], *ids]) == 1


@pytest.mark.parametrize("name", ["strings", "object"])
def test_a_mask_depends_on_the_text_alone(name, schemas):
    """Not on what was tried and taken back before it: a fresh constraint after the same text has the same mask."""
    schema, rng = (LANGUAGES | {"object": ({"type": "object"}, [])})[name][0], np.random.default_rng(0)
    constraint, text = schemas.constraint(schema), []
    for _ in range(100):
        if text and rng.random() < 0.4:
            count = int(rng.integers(1, len(text) + 1))
            constraint.rewind(count)
            del text[len(text) - count :]
        fresh = schemas.constraint(schema)
        for token in text:
            fresh.advance(token)
        mask = constraint.allowed()
        np.testing.assert_array_equal(mask, fresh.allowed())
        text.append(int(rng.choice(np.flatnonzero(mask))))
        constraint.advance(text[-1])


SCHEMAS = {
    "person": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 8},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["the", "quick"]}, "maxItems": 2},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    "either": {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 3}]},
    "recursive": {
        "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}},
        "$ref": "#/$defs/tree",
    },
    "any": True,
}


@pytest.fixture(scope="module")
def decoders(random_model, export_pair):
    """A pair with adaptive drafts, with drafts of 5 tokens, a fork of that, and the target alone."""
    pair = export_pair(random_model("llama"), quantize_drafter="int4")
    with (
        SpeculativeDecoder.load(pair.target, pair.drafter) as adaptive,
        SpeculativeDecoder.load(pair.target, pair.drafter, draft_length=5) as fixed,
        fixed.fork() as fork,
        SpeculativeDecoder.load(pair.target) as alone,
    ):
        yield adaptive, fixed, fork, alone


def plain(decoder, prompt, schema, new):
    """The definition: the most likely allowed token of the whole text, read anew, with a mask made anew."""
    output = []
    while len(output) < new and EOS not in output:
        decoder.target.rewind(0)
        row = decoder.target.feed([*prompt, *output]).logits[-1].copy()
        constraint = decoder._schemas.constraint(schema)
        for token in output:
            constraint.advance(token)
        row[~constraint.allowed()] = -np.inf
        output.append(int(row.argmax()))
    return tuple(output)


@pytest.mark.parametrize("name", SCHEMAS)
def test_output_under_a_schema_is_the_masked_targets_and_valid(name, decoders):
    """Random weights write junk: only the mask makes JSON of it."""
    schema, ended = SCHEMAS[name], 0
    for prompt in ([5, 17, 200, 33], [40, 41, 42] * 5):
        results = [decoder.generate(prompt, max_new_tokens=40, json_schema=schema) for decoder in decoders]
        assert {result.token_ids for result in results} == {plain(decoders[-1], prompt, schema, 40)}
        sampling = SamplingParams(1.5, top_p=0.9, seed=len(prompt))
        sampled = decoders[1].generate(prompt, max_new_tokens=100, json_schema=schema, sampling=sampling)
        for result in (results[0], sampled):
            if result.finish_reason == "stop":
                ended += 1
                jsonschema.validate(json.loads(result.text), schema)
    assert ended or name == "any"
    stream = decoders[0].stream([5], max_new_tokens=40, json_schema=schema, stop="a", logprobs=2)
    result = stream.finish()
    assert "a" not in result.text
    assert all(np.isfinite(value) for entry in result.logprobs for _, value in entry.top)


def nested(depth, leaf):
    return leaf if not depth else {"type": "array", "items": nested(depth - 1, leaf)}


HOSTILE = {
    "a list": ([1], "json_schema is list"),
    "false": (False, "json_schema is bool"),
    "text": ('{"type": "object"}', "json_schema is str"),
    "NaN": ({"minimum": float("nan")}, "json_schema is not JSON"),
    "a set": ({"enum": {1}}, "json_schema is not JSON"),
    "half of a pair": ({"const": "\ud800"}, "the JSON schema cannot be read"),
    "an unknown type": ({"type": "strin"}, "the JSON schema cannot be applied: .*strin"),
    "an unknown keyword": ({"type": "array", "uniqueItems": True}, "the JSON schema cannot be applied: .*uniqueItems"),
    "a URL": ({"$ref": "http://127.0.0.1:9/schema.json"}, "the JSON schema cannot be applied: .*127.0.0.1"),
    "a file": ({"$ref": "file:///etc/passwd"}, "the JSON schema cannot be applied: .*etc/passwd"),
    "nesting": (nested(200, {}), "the JSON schema cannot be read: recursion limit"),
    "deep nesting": (nested(900, {}), "the JSON schema cannot be read: recursion limit|nested too deeply"),
    "a huge enum": ({"enum": list(range(30_000))}, f"shorten it to at most {MOST_BYTES}"),
    "many states": ({"type": "integer", "multipleOf": 99_999_989}, "multipleOf"),
    "many states by parts": (
        {"allOf": [{"type": "integer", "multipleOf": 1009}, {"multipleOf": 21.1}]},
        "multipleOf of the JSON schema asks for too much",
    ),
    "a lookaround": ({"type": "string", "pattern": "(?=a)b"}, "look-around"),
    "open brackets": ({"type": "string", "pattern": "(" * 20_000}, "the JSON schema cannot be applied"),
    "nothing": ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "the JSON schema cannot be applied"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_schema_that_cannot_be_applied_is_one_line_in_a_moment(name, schemas):
    schema, message = HOSTILE[name]
    started = time.process_time()
    with pytest.raises(VocabtrimError, match=message) as caught:
        schemas.constraint(schema)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^((a{1,100}){1,100}){1,100}$"},
        {"type": "string", "pattern": "^(.*a){30}.{1000}$"},
        {"type": "array", "minItems": 10**9, "items": {"type": "number", "multipleOf": 0.01}},
        {"type": "string", "minLength": 10**8},
        {"enum": [f"the {number}" for number in range(4_000)]},
    ],
)
def test_a_costly_schema_is_followed_or_refused_in_a_moment(schema, schemas):
    started, rng = time.process_time(), np.random.default_rng(0)
    with suppress(VocabtrimError):
        constraint = schemas.constraint(schema)
        for _ in range(50):
            token = int(rng.choice(np.flatnonzero(constraint.allowed())))
            if token == EOS:
                break
            constraint.advance(token)
    assert time.process_time() - started < 5


def test_what_a_target_lacks_for_a_schema_is_one_line(backend, monkeypatch):
    mine, manifest = Tokenizer(backend, {}, None), make_manifest(head_rows=448)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    for schemas, message in (
        (JsonSchemas(None, manifest), "needs the target's tokenizer"),
        (JsonSchemas(mine, replace(manifest, eos_token_ids=(447,))), "needs a target with an EOS"),
        (JsonSchemas(Tokenizer(words, {}, None), manifest), "llguidance cannot read this target's tokenizer"),
    ):
        with pytest.raises(VocabtrimError, match=message) as caught:
            schemas.constraint(True)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(VocabtrimError, match=r"pip install 'vocabtrim-export\[json\]'"):
        JsonSchemas(mine, manifest).constraint(True)
