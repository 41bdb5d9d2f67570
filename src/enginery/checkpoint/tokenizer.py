"""Text to token ids and back, on the `tokenizers` library alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from enginery.checkpoint.bounded_json import read_json
from enginery.checkpoint.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate
from enginery.errors import CheckpointError, RequestError, UsageError

MAX_TOKENIZER_BYTES = 128 << 20
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
UNTRUSTED_ROLES = ("user", "tool", "function", "ipython")

# Stands for the n-th special token that a message spells, while the template runs: noncharacters, in no real text.
_MARK = "\ufdd0{}\ufdd1"
_MARKS = re.compile("\ufdd0([0-9]+)\ufdd1")


class Tokenizer:
    """The tokenizer of a model directory. Thread-safe: nothing changes after construction."""

    def __init__(
        self, backend: tokenizers.Tokenizer, settings: Mapping[str, Any] | None = None, chat_template: str | None = None
    ) -> None:
        self._backend = backend
        self.named_tokens = {
            name: text for name in NAMED_TOKENS if (text := _text((settings or {}).get(name))) is not None
        }
        """bos_token, eos_token, … to their texts"""
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(index for index, token in added.items() if token.special)
        self._special = _any_of(token.content for token in added.values() if token.special)
        self._added = _any_of(token.content for token in added.values())
        self._template = ChatTemplate(chat_template, dict(self.named_tokens)) if chat_template is not None else None

    @classmethod
    def from_directory(cls, directory: str | os.PathLike[str]) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json, special_tokens_map.json and the chat template."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f"{directory} has no tokenizer.json",
                "Make one: load the tokenizer with transformers and call save_pretrained",
            )
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_TOKENIZER_BYTES >> 20} MiB, which no tokenizer is")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer ({str(error)[:200]})") from None
        backend.no_padding()
        backend.no_truncation()
        settings = _optional_json(directory / "special_tokens_map.json") | _optional_json(
            directory / "tokenizer_config.json"
        )
        template = _chat_template(directory, settings)
        try:
            return cls(backend, settings, template)
        except CheckpointError as error:
            raise CheckpointError(f"{directory}: {error.cause}", error.fix) from None

    @property
    def vocab_size(self) -> int:
        """Tokens that it knows, added ones counted in; a model's logits may have more rows."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id(self.named_tokens.get("eos_token", ""))

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id(self.named_tokens.get("bos_token", ""))

    def token_id(self, token: str) -> int | None:
        """The id of a token's exact text."""
        return self._backend.token_to_id(token)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Raises RequestError for text that is no valid Unicode (a lone surrogate)."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except (TypeError, UnicodeEncodeError):  # so the library says that a surrogate is no text
            raise RequestError("the text is not valid Unicode: it has a lone surrogate") from None

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str | None]:
        """The vocabulary's own spelling of each token; None for an id that it does not have."""
        return [self._backend.id_to_token(index) for index in ids]

    def render_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """The text that the chat template makes of the messages."""
        if self._template is None:
            raise UsageError("the model has no chat template", "Use generate() with a plain prompt")
        return self._template.render([dict(message) for message in messages], add_generation_prompt, **kwargs)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Token ids of the rendered messages.

        Special tokens come from the template only: text of a message that spells one is encoded as plain text, and so
        is text of a user or a tool that spells any added token.
        """
        spelt: list[str] = []
        masked = [_mask(message, self._guard(message), spelt) for message in messages]
        masked_kwargs = {name: _mask(value, self._special, spelt) for name, value in kwargs.items()}
        text = self.render_chat(masked, add_generation_prompt, **masked_kwargs)
        ids: list[int] = []
        for position, piece in enumerate(_MARKS.split(text)):
            if position % 2 == 0:
                ids += self.encode(piece, add_special_tokens=False) if piece else []
            elif int(piece) < len(spelt):
                # no added token can match across the cut, so the vocabulary's ordinary tokens spell it
                token = spelt[int(piece)]
                ids += self.encode(token[:1], add_special_tokens=False) + self.encode(
                    token[1:], add_special_tokens=False
                )
        return ids

    def _guard(self, message: Mapping[str, Any]) -> re.Pattern[str] | None:
        return self._added if message.get("role") in UNTRUSTED_ROLES else self._special


def _mask(value: Any, tokens: re.Pattern[str] | None, spelt: list[str]) -> Any:
    """The value with each token that its strings spell replaced by a mark; the tokens are appended to `spelt`."""
    if isinstance(value, str):

        def mark(found: re.Match[str]) -> str:
            spelt.append(found.group())
            return _MARK.format(len(spelt) - 1)

        plain = value.replace("\ufdd0", "").replace("\ufdd1", "")
        return tokens.sub(mark, plain) if tokens is not None else plain
    if isinstance(value, Mapping):
        return {key: _mask(item, tokens, spelt) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mask(item, tokens, spelt) for item in value]
    return value


def _any_of(tokens: Iterable[str]) -> re.Pattern[str] | None:
    # one character cannot be cut in two; such tokens (a space run, a letter) carry no role
    longest_first = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _text(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise CheckpointError(f"{path}: larger than {MAX_TEMPLATE_BYTES >> 20} MiB, which no chat template is")
        return path.read_text(encoding="utf-8", errors="replace")
    template = _optional_json(directory / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):  # several, named: [{"name": ..., "template": ...}]
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
