"""Promises of `vocabtrim serve` and `vocabtrim chat`."""

from tests.mutations.mutation import Mutation

SERVE = "tests/integration/test_serve.py"
FAULTS = "tests/integration/test_serve_faults.py"
LOAD = "tests/integration/test_serve_load.py"
CHAT = "tests/integration/test_chat.py"

SERVER = (
    Mutation(
        "A server answers those who have its key",
        "any key is taken",
        "vocabtrim_export/serve/app.py",
        "if self._settings.api_key and not hmac",
        "if not self._settings.api_key and not hmac",
        f"{SERVE} -k routes",
    ),
    Mutation(
        "A client that leaves ends its generation",
        "the worker gets no notice",
        "vocabtrim_export/serve/workers.py",
        "running.cancelled.set()",
        "pass",
        f"{SERVE} -k leave",
    ),
    Mutation(
        "A client that leaves ends its generation",
        "a streamed answer keeps its place",
        "vocabtrim_export/serve/events.py",
        "                self._end(self._is_broken)",
        "                pass",
        f"{SERVE} -k place",
    ),
    Mutation(
        "A full queue is an answer at once",
        "everyone may wait",
        "vocabtrim_export/serve/workers.py",
        "if self.admitted >= self._most:",
        "if self.admitted > 1 << 20:",
        f"{SERVE} -k leave",
    ),
    Mutation(
        "A server's text is that of generate",
        "stop strings are passed over",
        "vocabtrim_export/serve/workers.py",
        "stop=job.stop or None",
        "stop=None",
        f"{SERVE} -k stops",
    ),
    Mutation(
        "A server's text is that of generate",
        "all answers to a prompt have one seed",
        "vocabtrim_export/serve/app.py",
        "if seed is None or index == 0",
        "if seed is None or index >= 0",
        f"{SERVE} -k stops",
    ),
    Mutation(
        "What a server lacks is refused",
        "unknown fields are ignored",
        "vocabtrim_export/serve/job.py",
        "    fields.finish()\n",
        "",
        f"{SERVE} -k unknown",
    ),
    Mutation(
        "A conversation in the terminal goes on",
        "answers are forgotten",
        "vocabtrim_export/cli/chat_command.py",
        "self._messages = [*messages, ",
        "self._messages = [*self._messages, ",
        f"{CHAT} -k lines",
    ),
    Mutation(
        "A conversation in the terminal goes on",
        "Ctrl-C ends no answer",
        "vocabtrim_export/cli/figures.py",
        "        if is_stopped():\n            break\n",
        "",
        f"{CHAT} -k ctrl_c_ends",
    ),
    Mutation(
        "Log-probabilities are each token's own",
        "tokens of one text overwrite each other",
        "vocabtrim_export/serve/answers.py",
        "name in named and named[name][0] != token",
        "False",
        f"{SERVE} -k stops",
    ),
    Mutation(
        "Slow clients do not keep others out",
        "a body may take for ever",
        "vocabtrim_export/serve/app.py",
        "asyncio.timeout(self._settings.body_seconds)",
        "asyncio.timeout(None)",
        f"{FAULTS} -k slow",
    ),
    Mutation(
        "Slow clients do not keep others out",
        "an answer waits for ever to be read",
        "vocabtrim_export/serve/events.py",
        "asyncio.timeout(self._seconds)",
        "asyncio.timeout(None)",
        f"{FAULTS} -k read",
    ),
    Mutation(
        "The queue's gauge counts who waits for a worker",
        "bodies that are still read are counted",
        "vocabtrim_export/serve/metrics.py",
        "lambda: workers.waiting",
        "lambda: workers.admitted - workers.busy",
        f"{FAULTS} -k slow",
    ),
    Mutation(
        "No request's text is ever in another's",
        "workers share a decoder",
        "vocabtrim_export/serve/workers.py",
        "Worker(decoder.fork())",
        "Worker(decoder)",
        f"{LOAD} -k load",
    ),
)
