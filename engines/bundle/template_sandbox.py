"""Compiles chat templates as transformers does, but in a stricter sandbox, because anyone may have written them."""

import json
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import wraps
from threading import Lock
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from engines.errors import VocabtrimError

MAX_SECONDS = 5.0  # processor time of one rendering, which takes less than a millisecond
_MAX_PRODUCT = 1 << 20  # elements of a repeated sequence, bits of a product or power
_LONGEST_TEXT = 1 << 26  # letters that pieces are put together to
_GROWING = ("batch", "center", "format", "indent", "replace", "slice", "tojson", "wordwrap")  # filters
_MAX_MESSAGE = 500
_METER = "vocabtrim_meter"


class CompiledTemplate:
    """A compiled chat template, which threads may share.

    Raises:
        VocabtrimError: The template does not parse.
    """

    def __init__(self, source: str) -> None:
        self._source, self._environment = source, _Sandbox()
        self._lock = Lock()  # one rendering at a time: the environment holds its deadline
        try:
            self._template = self._environment.from_string(source)
        except Exception as error:  # jinja2's own errors, and Python's for code that nests too deeply to compile
            raise VocabtrimError(f"the chat template does not parse: {one_line(error)}") from error

    def reads(self, variable: str) -> bool:
        """Returns whether the template reads a variable, in some of its branches at least."""
        return variable in find_undeclared_variables(self._environment.parse(self._source))

    def render(self, variables: Mapping[str, Any]) -> str:
        """Render the template with `variables`.

        Raises:
            VocabtrimError: The template fails or refuses the messages.
        """
        try:
            with self._lock:
                self._environment.deadline = time.thread_time() + MAX_SECONDS
                return self._template.render(variables)
        except Exception as error:  # a template may fail in any way that Python does
            raise VocabtrimError(f"the chat template refused the messages: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """Returns an error's message in bounded length, without line breaks and control characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else "?" for letter in text[:_MAX_MESSAGE])
    return text if len(text) < _MAX_MESSAGE else f"{text}…"


class _MeteredCode(CodeGenerator):
    """Makes every loop ask the environment before each iteration."""

    def visit_Template(self, node: nodes.Template, frame: Frame | None = None) -> None:
        for loop in list(node.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _METER, [], [], None, None, lineno=loop.lineno)
            loop.iter.set_environment(self.environment)
        super().visit_Template(node, frame)


class _Sandbox(ImmutableSandboxedEnvironment):
    """transformers' environment (`utils/chat_template_utils.py`), in which no template runs for long.

    Each iteration of a loop and each call looks at the time; operations, methods of texts and filters whose results
    would be of absurd size are refused.
    """

    code_generator_class = _MeteredCode
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"])
        self.deadline = math.inf
        self.filters |= {"tojson": _tojson, _METER: self._metered}
        self.filters |= {name: _bounded(name, self.filters[name]) for name in _GROWING}
        del self.globals["lipsum"]  # random text, of any length
        self.globals |= {"raise_exception": _raise_exception, "dict": _Dict(), "namespace": _Namespace}

    def call(self, context: Context, callee: Any, /, *args: Any, **kwargs: Any) -> Any:
        self._check_time()
        method = getattr(callee, "__wrapped__", callee)  # the sandbox wraps `format` of a text
        if isinstance(text := getattr(method, "__self__", None), str):
            _check_growth(callee.__name__, text, (*args, *kwargs.values()))
        return super().call(context, callee, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if _size(operator, left, right) > _MAX_PRODUCT:
            raise SecurityError(f"a result of {operator} is too large")
        return super().call_binop(context, operator, left, right)

    def _metered(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._check_time()
            yield value

    def _check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise SecurityError(f"it runs for more than {MAX_SECONDS:g} seconds")


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it only groups."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Dict:
    """`dict` for templates: makes dictionaries, without the attributes of Python's class."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """`namespace` for templates; as in transformers, no name in it begins with an underscore."""

    def __init__(*args: Any, **values: Any) -> None:  # `self` may be one of the names
        self, *mappings = args
        Namespace.__init__(self, {_public(name): value for name, value in dict(*mappings, **values).items()})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_public(name), value)


def _public(name: str) -> str:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: names with an underscore in front are refused")
    return name


def _size(operator: str, left: Any, right: Any) -> int:
    """Returns the most elements of a repeated sequence, or bits of an integer product or power; else 0."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
    if operator == "%" and isinstance(left, str):
        return _largest_width(left, right if isinstance(right, tuple) else (right,))
    if operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
        return _MAX_PRODUCT + 1 if len(left) + len(right) > _LONGEST_TEXT else 0
    for sequence, times in ((left, right), (right, left)):
        if operator == "*" and isinstance(sequence, str | list | tuple) and isinstance(times, int):
            return len(sequence) * abs(times)
    return 0


def _largest_width(form: str, values: Iterable[Any]) -> int:
    """Returns the largest number in a format, or among its values where it takes a width from them."""
    taken = [abs(value) for value in values if isinstance(value, int)] if "*" in form or "{" in form else []
    return max([*taken, *(int(digits[:20]) for digits in re.findall(r"[0-9]+", form))], default=0)


def _check_growth(name: str, subject: Any, arguments: Iterable[Any]) -> None:
    """Refuse a method of a text, or a filter, that would make a text of absurd size."""
    arguments = list(arguments)
    sizes = [abs(each) for each in arguments if isinstance(each, int)]
    if isinstance(subject, str) and name in ("format", "format_map"):
        sizes.append(_largest_width(subject, ()))
    too_long = False
    if isinstance(subject, str) and name == "replace" and len(arguments) > 1:
        too_long = subject.count(str(arguments[0])) * len(str(arguments[1])) > _LONGEST_TEXT
    if too_long or max(sizes, default=0) > _MAX_PRODUCT:
        raise SecurityError(f"a result of {name} is too large")


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a filter that looks at the size of its result first."""

    @wraps(function)
    def filtered(*args: Any, **kwargs: Any) -> Any:
        at = next((index for index, each in enumerate(args) if isinstance(each, str)), 0)
        _check_growth(name, args[at], (*args[at + 1 :], *kwargs.values()))
        return function(*args, **kwargs)

    return filtered


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write JSON without the HTML escapes of jinja2's own filter, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
