"""Promises about conversations, prompts and calibration data."""

from tests.mutations.mutation import Mutation

TEMPLATE, SANDBOX, MESSAGES = (
    "engines/bundle/chat_template.py",
    "engines/bundle/template_sandbox.py",
    "engines/bundle/messages.py",
)
CHAT_TESTS, CORPUS_TESTS = "tests/engines/test_chat_template.py", "tests/vocabtrim_export/test_corpus.py"
COUNT_TESTS = "tests/vocabtrim_export/test_counts.py"

CONVERSATIONS = (
    Mutation(
        "A conversation is rendered as transformers renders it",
        "a content of None is given to every template",
        MESSAGES,
        "if content is None and not forms.none:",
        "if False:",
        f"{CHAT_TESTS} -k as_transformers_renders",
    ),
    Mutation(
        "Text parts are read where a template takes strings",
        "parts are given as they are",
        TEMPLATE,
        "parts = _PROBE in as_parts and (as_parts == as_text or not _shows_keys(as_parts))",
        "parts = True",
        f"{CHAT_TESTS} -k parts",
    ),
    Mutation(
        "Arguments of tool calls are objects where a template takes no strings",
        "arguments stay what they are",
        TEMPLATE,
        "return MessageForms(text, parts, argument_text, reads_none, _PROBE in with_developer)",
        "return MessageForms(text, parts, True, reads_none, _PROBE in with_developer)",
        f"{CHAT_TESTS} -k openai",
    ),
    Mutation(
        "With tools the template for tools is chosen",
        "the default one is",
        TEMPLATE,
        "name = options.template or (TOOL_USE if wants_tools else DEFAULT)",
        "name = options.template or DEFAULT",
        f"{CHAT_TESTS} -k named_templates",
    ),
    Mutation(
        "No template runs for long",
        "loops are not metered",
        SANDBOX,
        "        for value in values:\n            self._check_time()\n",
        "        for value in values:\n",
        f"{CHAT_TESTS} -k hostile",
    ),
    Mutation(
        "A stop string can be a special token",
        "stop strings meet the text without them",
        "runtime/stop_strings.py",
        "self._held.append((piece, shown))",
        "self._held.append((shown, shown))",
        "tests/runtime/test_decoder.py -k meets_special",
    ),
    Mutation(
        "A plain stop string is one",
        "each of its letters is one",
        "runtime/stop_strings.py",
        "(stop,) if isinstance(stop, str) else tuple(stop or ())",
        "tuple(stop or ())",
        "tests/runtime/test_decoder.py -k plain_string",
    ),
    Mutation(
        "A calibration counts as many tokens as were asked for",
        "the last batch counts whole",
        "vocabtrim_export/calibration/batches.py",
        "if len(ids) - begun > left:",
        "if False:",
        f"{COUNT_TESTS} -k limit",
    ),
    Mutation(
        "A calibration goes on within the document that its limit cut",
        "the document's first tokens are counted again",
        "vocabtrim_export/calibration/batches.py",
        "next_done=begun",
        "next_done=0",
        f"{COUNT_TESTS} -k raised",
    ),
    Mutation(
        "A calibration killed within a batch loses some seconds of it",
        "the batch starts over",
        "vocabtrim_export/calibration/partial_batch.py",
        "while (segment := self._read(self._path(self.count))) is not None:",
        "while False and (segment := self._read(self._path(self.count))) is not None:",
        f"{COUNT_TESTS} -k killed",
    ),
    Mutation(
        "Domains have the shares that their weights say",
        "weights are not looked at",
        "vocabtrim_export/calibration/counts.py",
        "each.runs[0].weight / max(1, each.total)",
        "1.0",
        "tests/vocabtrim_export/test_domains.py -k too_little",
    ),
    Mutation(
        "A server that serves another model is refused",
        "counts of tokens are not compared",
        "vocabtrim_export/calibration/endpoint.py",
        "ours >= _ENOUGH_TO_TELL and",
        "False and",
        "tests/vocabtrim_export/test_endpoint.py -k wrong",
    ),
    Mutation(
        "Compressed and binary files are never counted as text",
        "first bytes are not looked at",
        "vocabtrim_export/calibration/data_files.py",
        "if begin.startswith(magic) or (begin and suffix in suffixes):",
        "if False:",
        f"{CORPUS_TESTS} -k one_clear_line",
    ),
    Mutation(
        "A table's columns are told, and its empty rows passed over",
        "columns that hold no text are forgotten",
        "vocabtrim_export/calibration/arrow_files.py",
        "dict.fromkeys(names) | row",
        "row",
        f"{CORPUS_TESTS} -k one_clear_line",
    ),
    Mutation(
        "A record that cannot be a prompt is left out, and named",
        "nothing is said",
        "vocabtrim_export/calibration/calibrate.py",
        "        events.on_skip(each)\n",
        "        pass\n",
        f"{COUNT_TESTS} -k left_out",
    ),
)
