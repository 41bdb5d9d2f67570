"""Chat templates: Jinja programs that a model repository brings along, run in a sandbox, bounded in output and time."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from enginery.errors import CheckpointError, RequestError

MAX_TEMPLATE_BYTES = 1 << 20
MAX_OUTPUT_CHARACTERS = 1 << 20
MAX_REPETITION = 1 << 20
MAX_SECONDS = 2.0


class TemplateRefusal(Exception):
    """The template called raise_exception: it does not accept these messages."""


class _OutOfBounds(Exception):
    pass


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks what training counts as the model's own words. For inference it is its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The immutable sandbox of Jinja, in which calls and look-ups watch the clock and products watch their size."""

    intercepted_binops = frozenset(["*", "**", "+"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _Generation])
        self.deadline = float("inf")
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = _strftime_now

    def watch(self) -> None:
        if time.monotonic() > self.deadline:
            raise _OutOfBounds(f"runs longer than {MAX_SECONDS:g} s")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.watch()
        return super().call(*args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.watch()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.watch()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.watch()
        if operator == "**" and not (_is_small(left) and _is_small(right)):
            raise _OutOfBounds("raises to a large power")
        if operator == "*" and len_of(left) * _count(right) + len_of(right) * _count(left) > MAX_REPETITION:
            raise _OutOfBounds("repeats a text too often")
        if operator == "+" and len_of(left) + len_of(right) > 2 * MAX_REPETITION:
            raise _OutOfBounds("joins texts that are too long")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled template. `render` may be called from several threads."""

    def __init__(self, source: str, variables: dict[str, Any]) -> None:
        """`variables` are seen by every rendering: bos_token, eos_token and the like."""
        if len(source) > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"the chat template has {len(source)} characters, more than {MAX_TEMPLATE_BYTES}")
        self.source = source
        self._variables = variables
        try:
            _Sandbox().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise CheckpointError(f"the chat template cannot be compiled ({_line(error)})") from None

    def render(self, messages: list[dict[str, Any]], add_generation_prompt: bool = True, **kwargs: Any) -> str:
        """The prompt's text. Raises RequestError when the template refuses the messages or leaves its bounds."""
        environment = _Sandbox()
        environment.deadline = time.monotonic() + MAX_SECONDS
        variables = {**self._variables, **kwargs, "messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return "".join(_bounded(environment.from_string(self.source).generate(variables)))
        except TemplateRefusal as error:
            raise RequestError(f"the chat template refuses the messages: {_line(error)}") from None
        except _OutOfBounds as error:
            raise RequestError(f"the chat template {error}") from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            AttributeError,
            RecursionError,
            MemoryError,
        ) as error:
            raise RequestError(f"the chat template fails on these messages ({_line(error)})") from None


def _bounded(pieces: Iterator[str]) -> Iterator[str]:
    total = 0
    for piece in pieces:
        total += len(piece)
        if total > MAX_OUTPUT_CHARACTERS:
            raise _OutOfBounds(f"writes more than {MAX_OUTPUT_CHARACTERS} characters")
        yield piece


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # not Jinja's own filter: that one escapes for HTML
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> None:
    raise TemplateRefusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def len_of(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else 0


def _count(value: Any) -> int:
    return max(value, 0) if isinstance(value, int) else 0


def _is_small(value: Any) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= 64


def _line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
