"""JSON by a schema through the server and the command: the text of `generate`, and refusals in one line."""

import asyncio
import json

import pytest

from runtime import SamplingParams, SpeculativeDecoder
from vocabtrim_export.cli.main import main
from vocabtrim_export.serve.settings import ServeSettings

openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")
pytest.importorskip("llguidance")
Server = pytest.importorskip("vocabtrim_export.serve.app").Server

MESSAGES = [{"role": "user", "content": "the quick brown fox"}]
SCHEMA = {
    "type": "object",
    "properties": {"fox": {"enum": ["quick", "lazy"]}, "dogs": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["fox", "dogs"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "animals", "strict": True, "schema": SCHEMA}}
FORMS = [{"fox": fox, "dogs": dogs} for fox in ("quick", "lazy") for dogs in range(1, 10)]


@pytest.fixture(scope="module")
def decoder(pair):
    with SpeculativeDecoder.load(pair.target, pair.drafter) as decoder:
        yield decoder


@pytest.fixture(scope="module")
def ask(decoder):
    """ask(path, body) → the response of a server with two workers."""
    served = Server(decoder.fork(), ServeSettings("tiny", workers=2))
    app = served.app()

    def send(body, path="chat/completions"):
        async def post():
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://tiny/v1/") as client:
                return await client.post(path, json={"model": "tiny", **body})

        return runner.run(post())

    with asyncio.Runner() as runner:  # one event loop, which still gives a worker back after its answer
        yield send
    served.workers.close()


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.3, "seed": 5}])
def test_the_answer_is_generates_own_and_of_the_schema(ask, decoder, sampling):
    """Whole and streamed, several at once, with log-probabilities among what the schema allows."""
    body = {"messages": MESSAGES, "max_tokens": 100, "response_format": FORMAT, **sampling}
    params = [SamplingParams(**sampling), SamplingParams(**sampling | ({"seed": 6} if "seed" in sampling else {}))]
    ours = [decoder.generate(MESSAGES, max_new_tokens=100, sampling=each, json_schema=SCHEMA) for each in params]
    answer = openai.types.chat.ChatCompletion(**ask({**body, "n": 2, "logprobs": True, "top_logprobs": 3}).json())
    assert [choice.message.content for choice in answer.choices] == [each.text for each in ours]
    assert all(json.loads(choice.message.content) in FORMS for choice in answer.choices)
    assert {choice.finish_reason for choice in answer.choices} == {"stop"}
    certain = [entry for entry in answer.choices[0].logprobs.content if len(entry.top_logprobs) == 1]
    assert certain  # such as the first bracket
    assert all(entry.logprob == pytest.approx(0, abs=1e-6) for entry in certain)
    lines = ask({**body, "stream": True}).text.split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and line != "data: [DONE]"]
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks) == ours[0].text


def test_objects_text_completions_and_stop_strings(ask, decoder):
    greedy = {"temperature": 0, "max_tokens": 40}
    plain = decoder.generate("the", max_new_tokens=40, chat=False).text
    for form, schema in (({"type": "text"}, None), ({"type": "json_object"}, {"type": "object"}), (FORMAT, SCHEMA)):
        text = ask({**greedy, "prompt": "the", "response_format": form}, "completions").json()["choices"][0]["text"]
        assert text == decoder.generate("the", max_new_tokens=40, chat=False, json_schema=schema).text
        assert (text == plain) == (schema is None)
    cut = ask({**greedy, "prompt": "the", "response_format": FORMAT, "stop": ['"fox']}, "completions").json()
    assert cut["choices"][0]["text"].strip() == "{"
    assert cut["choices"][0]["finish_reason"] == "stop"


BAD = {
    "an unknown type": ({"type": "yaml"}, "its type must be"),
    "a text": ("json_object", "response_format is"),
    "no schema": ({"type": "json_schema"}, "json_schema must be an object with a 'schema'"),
    "a list": ({"type": "json_schema", "json_schema": {"name": "a", "schema": []}}, "'schema' that is an object"),
    "an unknown part": ({"type": "json_schema", "json_schema": {"schema": {}, "grammar": ""}}, "'grammar' does not"),
    "a part too many": ({"type": "text", "json_schema": {}}, "'json_schema' does not belong"),
    "an unknown keyword": ({"type": "json_schema", "json_schema": {"schema": {"not": {}}}}, "Unimplemented keys"),
    "a URL": (
        {"type": "json_schema", "json_schema": {"schema": {"$ref": "http://127.0.0.1:9/"}}},
        "does not fetch resources",
    ),
    "a large one": (
        {"type": "json_schema", "json_schema": {"schema": {"enum": list(range(20_000))}}},
        "bytes: shorten it to at most 65536",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_format_that_cannot_be_followed_is_refused_in_openais_form(name, ask):
    form, message = BAD[name]
    response = ask({"messages": MESSAGES, "response_format": form})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, "response_format", "invalid_request_error")
    assert message in error["message"]


def test_the_command_follows_a_schema_or_says_why_not(pair, tmp_path, capsys):
    file = tmp_path / "schema.json"
    command = ["generate", "--target", str(pair.target), "--drafter", str(pair.drafter), "--prompt", "the", "--json"]
    file.write_text(json.dumps(SCHEMA))
    assert main([*command, "--max-new-tokens", "100", "--json-schema", str(file)]) == 0
    assert json.loads(json.loads(capsys.readouterr().out)["text"]) in FORMS
    assert main([*command, "--max-new-tokens", "9", "--json-object"]) == 0
    assert json.loads(capsys.readouterr().out)["text"].startswith("{")
    for text, message in (("{", "is not JSON"), ("null", "holds no JSON schema"), ('{"not": {}}', "cannot be applied")):
        file.write_text(text)
        assert main([*command, "--json-schema", str(file)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
