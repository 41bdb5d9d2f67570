"""Reads the values of the text form: tensors, numbers, symbolic sizes, dtypes, strings, lists; and types."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import torch

from enginery.errors import NetworkError
from enginery.network.dim import Dim, Size
from enginery.network.tensor import Tensor
from enginery.network.text import DTYPES

MAX_DEPTH = 16
"""of lists and of sizes within sizes"""

_TOKEN = re.compile(
    r"\s*(?:(?P<name>%(?:[A-Za-z_][\w.\-]*(?:\#\d{1,6})?|\"(?:[^\"\\]|\\.)*\"))"
    r"|(?P<number>\d+(?:\.\d*)?(?:e[+-]?\d+)?)"
    r"|(?P<word>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)?)"
    r"|(?P<string>\"(?:[^\"\\]|\\.)*\")"
    r"|(?P<mark>//|[\[\](),=*%+\-.]))"
)
_SIMPLE = re.compile(r"[^\[\"(]*\Z")
"""arguments without lists, strings and calls: they are split at commas"""
_NAMED = re.compile(r"([A-Za-z_]\w*)=(?!=)(.*)\Z", re.DOTALL)
_CONSTANTS: Mapping[str, Any] = {
    "True": True,
    "False": False,
    "None": None,
    "inf": float("inf"),
    "nan": float("nan"),
    **DTYPES,
}


class Expressions:
    """Values that name no tensor are remembered by their text: a network says the same few again and again."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._literals: dict[str, Any] = {}

    def call(self, text: str) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of a call: positional, then named."""
        positional: list[Any] = []
        named: dict[str, Any] = {}
        if not text:
            return positional, named
        for part in text.split(", ") if _SIMPLE.match(text) else _split(text):
            if part.startswith("%"):
                positional.append(self.tensor(part))
                continue
            found = _NAMED.match(part)
            if found is None:
                if named:
                    raise NetworkError("an argument without a name follows one with a name")
                positional.append(self.value(part))
            elif found[1] in named:
                raise NetworkError(f"argument {found[1]!r} is given twice")
            else:
                named[found[1]] = self.value(found[2])
        return positional, named

    def tensor(self, text: str) -> Tensor:
        name = _string(text[1:]) if text.startswith('%"') else text[1:]
        tensor = self._tensors.get(name)
        if tensor is None:
            raise NetworkError(f"{text[:80]} is used before it is defined")
        return tensor

    def value(self, text: str) -> Any:
        if text.startswith("%"):
            return self.tensor(text)
        if text in self._literals:
            return self._literals[text]
        reader = _Reader(text, self)
        value = reader.value(0)
        reader.expect_end()
        if "%" not in text or not _holds_tensor(value):
            self._literals[text] = value
        return value

    def types(self, text: str) -> tuple[tuple[tuple[Size, ...], torch.dtype], ...]:
        """Types separated by commas, such as `float32[2, n], int64[n]`."""
        reader = _Reader(text, self)
        types: list[tuple[tuple[Size, ...], torch.dtype]] = []
        while not reader.at_end():
            if types:
                reader.expect(",")
            types.append(reader.type())
        return tuple(types)


class _Reader:
    """Recursive descent over the tokens of one value."""

    def __init__(self, text: str, expressions: Expressions) -> None:
        self.text = text
        self.expressions = expressions
        self.tokens: list[tuple[str, str]] = []
        end, length = 0, len(text.rstrip())
        while end < length:
            found = _TOKEN.match(text, end)
            if found is None:
                raise NetworkError(f"{text[end : end + 40]!r} is not understood")
            self.tokens.append((str(found.lastgroup), found[str(found.lastgroup)]))
            end = found.end()
        self.place = 0

    def at_end(self) -> bool:
        return self.place == len(self.tokens)

    def peek(self) -> str:
        return self.tokens[self.place][1] if self.place < len(self.tokens) else ""

    def take(self) -> tuple[str, str]:
        if self.place == len(self.tokens):
            raise NetworkError(f"{self.text[-40:]!r} ends too early")
        self.place += 1
        return self.tokens[self.place - 1]

    def accept(self, mark: str) -> bool:
        if self.peek() == mark:
            self.place += 1
            return True
        return False

    def expect(self, mark: str) -> None:
        if not self.accept(mark):
            raise NetworkError(f"{mark!r} is expected in {self.text[:80]!r}")

    def expect_end(self) -> None:
        if not self.at_end():
            raise NetworkError(f"{self.peek()!r} is too much in {self.text[:80]!r}")

    def value(self, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise NetworkError(f"values are nested deeper than {MAX_DEPTH}")
        if self.place == len(self.tokens):
            raise NetworkError("a value is missing")
        kind, text = self.tokens[self.place]
        if kind == "name":
            self.place += 1
            return self.expressions.tensor(text)
        if kind == "string":
            self.place += 1
            return _string(text)
        if self.accept("["):
            return self.items(depth)
        if kind == "word" and (text in _CONSTANTS or "." in text or text == "device"):
            self.place += 1
            return self.word(text)
        if text == "-" and self.tokens[self.place + 1 : self.place + 2] == [("word", "inf")]:
            self.place += 2
            return float("-inf")
        return self.number(depth)

    def items(self, depth: int) -> tuple:
        found: list[Any] = []
        while not self.accept("]"):
            if found:
                self.expect(",")
            found.append(self.value(depth + 1))
        return tuple(found)

    def word(self, text: str) -> Any:
        if text in _CONSTANTS:
            return _CONSTANTS[text]
        if text == "device":
            self.expect(".")
            return _device(_string(self.take()[1]))
        group, _, name = text.partition(".")
        value = getattr(torch, name, None)
        if group in ("memory_format", "layout") and type(value).__name__ == group:
            return value
        raise NetworkError(f"{text!r} is not understood")

    def number(self, depth: int) -> float | Size:
        """A float, or a size."""
        negative = self.peek() == "-"
        text = self.tokens[self.place + negative : self.place + negative + 1]
        if text and text[0][0] == "number" and not text[0][1].isdigit():
            self.place += 1 + negative
            return -float(text[0][1]) if negative else float(text[0][1])
        return self.size(depth)

    def size(self, depth: int) -> Size:
        """Products that are added and subtracted."""
        total: Size = 0
        sign = -1 if self.accept("-") else 1
        while True:
            product: Size = sign
            product = self.atom(depth) * product
            while self.accept("*"):
                product = self.atom(depth) * product
            total = product + total
            if self.accept("+"):
                sign = 1
            elif self.accept("-"):
                sign = -1
            else:
                return total

    def atom(self, depth: int) -> Size:
        if depth > MAX_DEPTH:
            raise NetworkError(f"sizes are nested deeper than {MAX_DEPTH}")
        kind, text = self.take()
        if kind == "number" and text.isdigit() and len(text) < 20:
            return int(text)
        if text == "(":
            left = self.size(depth + 1)
            function = self.take()[1]
            if function not in ("//", "%"):
                raise NetworkError(f"{function!r} where // or % is expected")
            right = self.size(depth + 1)
            self.expect(")")
            return _apply(function, left, right)
        if text in ("min", "max"):
            self.expect("(")
            left = self.size(depth + 1)
            self.expect(",")
            right = self.size(depth + 1)
            self.expect(")")
            return _apply(text, left, right)
        if kind == "word" and text not in _CONSTANTS and "." not in text:
            return Dim.symbol(text)
        raise NetworkError(f"{text!r} is no size")

    def type(self) -> tuple[tuple[Size, ...], torch.dtype]:
        kind, text = self.take()
        if kind != "word" or text not in DTYPES:
            raise NetworkError(f"{text!r} is no dtype")
        self.expect("[")
        sizes: list[Size] = []
        while not self.accept("]"):
            if sizes:
                self.expect(",")
            size = self.size(0)
            if isinstance(size, int) and size < 0:
                raise NetworkError(f"{size} is no size")
            sizes.append(size)
        return tuple(sizes), DTYPES[text]


def _apply(function: str, left: Size, right: Size) -> Size:
    if right == 0 and function in ("//", "%"):
        raise NetworkError("a size is divided by 0")
    return Dim.apply(function, left, right)


def _string(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, str):
        raise NetworkError(f"{text[:40]!r} is no string")
    return value


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError:
        raise NetworkError(f"{name[:40]!r} is no device") from None


def _holds_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple) and any(map(_holds_tensor, value)))


def _split(text: str) -> list[str]:
    """The parts between the commas that stand in no bracket and in no string."""
    parts, depth, start, quoted, skip = [], 0, 0, False, False
    for place, character in enumerate(text):
        if skip:
            skip = False
        elif quoted:
            skip = character == "\\"
            quoted = character != '"'
        elif character == '"':
            quoted = True
        elif character in "[(":
            depth += 1
        elif character in "])":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:place].strip())
            start = place + 1
    parts.append(text[start:].strip())
    return parts
