"""Conversations are rendered as transformers renders them, and a hostile template ends in one line."""

import time
from datetime import datetime
from types import SimpleNamespace

import pytest

from engines.bundle import template_sandbox
from engines.bundle.chat_template import ChatOptions, ChatTemplates, named_templates
from engines.errors import VocabtrimError
from tests.engines.chat_templates import PARTS_ONLY, TEMPLATES

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
DESCRIPTION = "The <weather> & more é\nof a town"
PROPERTIES = {"town": {"type": "string"}, "days": {"type": "array", "items": {"type": "integer"}}}
PARAMETERS = {"type": "object", "properties": PROPERTIES | {"at": {"type": "object", "properties": PROPERTIES}}}
TOOL = {"type": "function", "function": {"name": "weather", "description": DESCRIPTION, "parameters": PARAMETERS}}


def message(role, content, **more):
    return {"role": role, "content": content} | more


def call(arguments):
    function = {"name": "weather", "arguments": arguments}
    return message("assistant", None, tool_calls=[{"id": "abcdefghi", "type": "function", "function": function}])


TOWN_TEXT = '{"town": "Ulm", "days": [1, 2]}'  # DeepSeek's templates read strings alone, in transformers too
SYSTEM = message("system", " Be <brief> & kind. /no_think ")
RESULT = message("tool", '{"sun": true}', tool_call_id="abcdefghi")
CHATS = {
    "user": [message("user", "Hi é 你好 <&> ")],
    "system": [SYSTEM, message("user", "Hi")],
    "turns": [message("user", "a"), message("assistant", "<think>\nhm\n</think>\n\nb "), message("user", "c")],
    "tool": [SYSTEM, message("user", "How?"), call({"town": "Ulm", "days": [1, 2]}), RESULT, RESULT],
    "reasoning": [message("user", "a"), message("assistant", "b", reasoning="because", refusal=None)],
    "alike": [message("user", "a"), message("user", "b")],
    "critic": [message("critic", "no")],
}
ARGUMENTS = {
    "enable_thinking": False,
    "date_string": "1 Jan",
    "controls": {"citations": True},
    "documents": [{"title": "t", "text": "d é", "id": 3}],
}
OPTIONS = {
    "plain": {},
    "tools": {"tools": [TOOL]},
    "no tools": {"tools": []},
    "arguments": {"template_args": ARGUMENTS},
    "open": {"continue_final_message": True},
    "no answer": {"template_args": {"add_generation_prompt": False}},
}


def templates(source):
    return ChatTemplates(named_templates(source), SPECIAL)


@pytest.fixture(scope="module")
def expected():
    """Returns the prompt that transformers renders; None where it raises."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>"))

    def render(source, chat, template_args=None, continue_final_message=False, tools=None):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=source, **SPECIAL)
        arguments = {"add_generation_prompt": not continue_final_message} | (template_args or {})
        how = {"tools": tools, "continue_final_message": continue_final_message, "tokenize": False}
        try:
            return tokenizer.apply_chat_template(chat, **how, **arguments)
        except Exception:
            return None

    return render


def rendered(source, chat, **options):
    try:
        return templates(source).render(chat, ChatOptions(**options))
    except VocabtrimError:
        return None


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("name", [name for name in TEMPLATES if name != "parts_only"])
def test_a_conversation_is_rendered_as_transformers_renders_it(expected, name, options):
    source, given = TEMPLATES[name], OPTIONS[options]
    found = {chat: rendered(source, messages, **given) for chat, messages in CHATS.items()}
    readable = CHATS | {"tool": [*CHATS["tool"][:2], call(TOWN_TEXT), RESULT, RESULT]} if name == "deepseek" else CHATS
    wanted = {chat: expected(source, messages, **given) for chat, messages in readable.items()}
    assert found == wanted
    assert found["user"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_reads_tools_where_these_change_the_prompt(name):
    """Otherwise a request with tools would be answered as if it had none."""
    chat, how = [message("user", [{"type": "text", "text": "a"}])], {"tools_in_user_message": False}
    plain, offered = (rendered(TEMPLATES[name], chat, tools=tools, template_args=how) for tools in (None, [TOOL]))
    assert templates(TEMPLATES[name]).reads_tools(ChatOptions(tools=[TOOL])) == (plain != offered)


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_parts_and_strings_are_read_whatever_the_template_takes(expected, name):
    source, parts = TEMPLATES[name], [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    reads_parts = name in ("gemma", "mistral", "vision", "parts_only")
    wanted = expected(source, [message("user", parts if reads_parts else "ab")])
    assert rendered(source, [message("user", parts)]) == wanted
    text = [{"type": "text", "text": "ab"}] if name == "parts_only" else "ab"
    wanted = expected(source, [message("user", text)])
    assert rendered(source, [message("user", "ab")]) == wanted


@pytest.mark.parametrize("name", ["llama", "qwen", "mistral", "deepseek", "command"])
def test_arguments_of_tool_calls_are_read_as_openai_has_them(expected, name):
    """A string stays one where the template takes strings, and is an object where it would be quoted once more."""
    as_text, as_object = [[message("user", "a"), call(given)] for given in ('{"town":"Ulm"}', {"town": "Ulm"})]
    wanted = expected(TEMPLATES[name], as_text if name in ("qwen", "deepseek") else as_object)
    assert rendered(TEMPLATES[name], as_text) == wanted


@pytest.mark.parametrize("name", ["llama", "qwen", "mistral", "deepseek", "command"])
def test_objects_as_arguments_of_tool_calls_are_text_to_a_template_that_reads_text(expected, name):
    chat = [message("user", "a"), call({"town": "Köln"})]
    wanted = expected(TEMPLATES[name], [chat[0], call('{"town": "Köln"}')] if name == "deepseek" else chat)
    assert rendered(TEMPLATES[name], chat) == wanted
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}"
    printed = "{% for m in messages %}{{ m.content or '' }}" + calls + "{% endfor %}"
    assert rendered(printed, chat) == 'a{"town": "Köln"}'  # and not as Python writes a dict


def test_a_tool_call_without_a_content_is_read_as_one_with_none():
    content = "{{ '(none)' if m['content'] is none else m['content'] + '' }}"  # fails where there is none
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}"
    source = "{% for m in messages %}" + content + calls + "{% endfor %}"
    absent = {key: value for key, value in call("{}").items() if key != "content"}
    assert rendered(source, [message("user", "a"), absent]) == "a(none){}"


@pytest.mark.parametrize(
    ("content", "written"),
    [
        ("{{ message['content'] }}", ""),
        ("{% if message['content'] is none %}(none){% else %}{{ message['content'] }}{% endif %}", "(none)"),
    ],
)
def test_a_content_of_none_is_none_to_a_template_that_asks_for_it(content, written):
    """DeepSeek's templates write tool calls only where the content is none; others would write "None"."""
    calls = "{% for c in message['tool_calls'] or [] %}[{{ c['function']['arguments'] }}]{% endfor %}"
    source = "{% for message in messages %}" + content + calls + "{% endfor %}"
    assert rendered(source, [message("user", "Hi"), call("{}")]) == f"Hi{written}[{{}}]"


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("more", [{}, {"tool_calls": []}, {"refusal": None, "tool_calls": None}])
def test_a_message_with_neither_text_nor_calls_is_empty(name, more):
    """Servers write their answers so, and clients send them back with the next question."""
    chats = [
        [message("user", "a"), message("assistant", content) | others, message("user", "b")]
        for content, others in (("", {}), (None, more))
    ]
    empty, none = (templates(TEMPLATES[name]).render(chat) for chat in chats)
    assert none == empty


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_developers_message_is_never_lost(expected, name):
    """OpenAI's clients name the system so: a template that knows no such role gets the system's message."""
    chat, as_system = [[message(role, "Be kind."), message("user", "Hi")] for role in ("developer", "system")]
    if name == "parts_only":
        chat, as_system = [
            [each | {"content": [{"type": "text", "text": each["content"]}]} for each in c] for c in (chat, as_system)
        ]
    wanted = expected(TEMPLATES[name], chat)
    wanted = expected(TEMPLATES[name], as_system) if "Be kind." not in (wanted or "") else wanted
    assert rendered(TEMPLATES[name], chat) == wanted


def test_objects_are_read_as_plain_data(expected):
    chat = [SimpleNamespace(model_dump=lambda: message("user", "a", name=None)), message("assistant", "b")]
    assert rendered(TEMPLATES["qwen"], chat) == expected(TEMPLATES["qwen"], [message("user", "a"), chat[1]])
    assert (
        rendered("{{ x.y }}{{ x.z }}", CHATS["user"], template_args={"x": {"y": object, "z": (1, 2)}}) == "<type>(1, 2)"
    )


def test_the_date_is_todays_or_the_one_given():
    template = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    assert rendered(template, CHATS["user"], now=datetime(2024, 7, 26)) == "26 Jul 2024"
    assert rendered(template, CHATS["user"]) == datetime.now().strftime("%d %b %Y")


def test_named_templates_are_chosen_as_transformers_chooses(expected):
    named = {"default": "D", "tool_use": "T", "rag": "R"}
    for given, wanted in (({}, "D"), ({"tools": [TOOL]}, "T"), ({"tools": []}, "T")):
        assert rendered(named, CHATS["user"], **given) == wanted == expected(named, CHATS["user"], **given)
    assert (
        rendered([{"name": name, "template": text} for name, text in named.items()], CHATS["user"], template="rag")
        == "R"
    )
    for source, options, message_ in [
        ({"rag": "R", "tool_use": "T"}, {}, "no chat template is named default: choose one of rag, tool_use"),
        ("D", {"template": "x"}, "no chat template is named x: choose one of default"),
        (None, {}, "no chat template"),
    ]:
        with pytest.raises(VocabtrimError, match=message_):
            templates(source).render(CHATS["user"], ChatOptions(**options))


def test_how_an_assistants_turn_ends():
    ends = {name: templates(source).assistant_end("default") for name, source in TEMPLATES.items()}
    assert (ends["llama"], ends["qwen"], ends["mistral"], ends["deepseek"]) == (
        "<|eot|>",
        "<|im_end|>\n",
        "</s>",
        "<|end|>",
    )
    assert templates("{{ raise_exception('never') }}").assistant_end("default") == ""


@pytest.mark.parametrize(
    ("chat", "options", "error"),
    [
        ([], {}, "conversation is empty"),
        ("text", {}, "conversation is empty"),
        ([3], {}, r"messages\[0\] is no message"),
        ([{"from": "human", "value": "Hi"}], {}, r"messages\[0\] has no role: give one"),
        ([*CHATS["user"], {"role": "assistant"}], {}, r"messages\[1\] has no content: give it a text"),
        (
            [message("assistant", None, function_call={"name": "f", "arguments": "{}"})],
            {},
            "function_call.* tool_calls",
        ),
        ([message("user", [{"type": "image_url", "image_url": {}}])], {}, r"messages\[0\] .* 'image_url': only text"),
        (CHATS["user"], {"tools": [print]}, r"tools\[0\] is no JSON schema .*get_json_schema"),
        (CHATS["user"], {"tools": TOOL}, "tools must be a list"),
        (CHATS["user"], {"template_args": {"messages": []}}, "messages is no template argument"),
        (CHATS["user"], {"template_args": [1]}, "template_args must map"),
        ([call("{}")], {"continue_final_message": True}, "no text to continue"),
        (
            CHATS["user"],
            {"continue_final_message": True, "template_args": {"add_generation_prompt": True}},
            "cannot go with continue_final_message",
        ),
    ],
)
def test_what_is_no_conversation_is_one_clear_line(chat, options, error):
    with pytest.raises(VocabtrimError, match=error):
        templates(PARTS_ONLY).render(chat, ChatOptions(**options))


def test_a_final_message_that_is_written_twice_cannot_be_continued():
    """The mark of its end would stay in the prompt."""
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content }}"
    with pytest.raises(VocabtrimError, match="does not write the final message once"):
        templates(source).render(CHATS["user"], ChatOptions(continue_final_message=True))


HOSTILE = [
    "{% set r = range(3000) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",  # no call within the loops
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for x in [[1, 2]] recursive %}{{ loop([[1, 2], [1, 2]]) }}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{{ 99999999 ** 99999999 }}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ '%9999999999d' % 5 }}",
    "{{ '%*d' % (9999999999, 5) }}",
    "{{ '{:>9999999999}'.format(5) }}",
    "{{ 'a'.center(9999999999) }}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "{{ 'a' | indent(9999999999) }}",
    "{{ messages | tojson(indent=9999999999) }}",
    "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}",
    "{{ dict.__init__.__globals__ }}",
    "{{ namespace(__class__=1) }}",
    "{{ messages.append(1) }}",
    "{% include '/etc/passwd' %}",
    "{{ 1 / 0 }}",
    "{{ raise_exception('a\nb\x1b[31m' * 900) }}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{% for a in b %}" * 30 + "{% endfor %}" * 30,
]


@pytest.mark.parametrize("source", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_template_ends_soon_and_in_one_line(source, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.05)
    began = time.thread_time()
    with pytest.raises(VocabtrimError, match="chat template") as error:
        templates(source).render(CHATS["user"])
    assert time.thread_time() - began < 3
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 600
