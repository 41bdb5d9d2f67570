"""What callers may give as prompts, conversations and parameters, and what a session makes of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from enginery.checkpoint.tokenizer import Tokenizer
from enginery.errors import RequestError, UsageError
from enginery.runtime.sampling_params import BeamSearchParams, SamplingParams

Prompt = str | Mapping[str, Any] | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Params = SamplingParams | BeamSearchParams
Read = tuple[str | None, list[int]]
"""text, if there was one, and token ids"""

_FORMS = "Give text, token ids, {'prompt': ...} or {'prompt_token_ids': [...]}, or a list of those"


def listed_prompts(prompts: Prompt | Iterable[Prompt]) -> list[Any]:
    """One prompt or many, as many."""
    prompts = _plain(prompts)
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise RequestError(f"the prompt is a {type(prompts).__name__}", _FORMS)
    found = list(prompts)
    return [found] if found and isinstance(found[0], Integral) else found


def listed_conversations(messages: Messages | Iterable[Messages]) -> list[Any]:
    """One conversation or many, as many."""
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Iterable):
        kind = type(messages).__name__
        raise RequestError(f"the conversation is a {kind}", "Give a list of {'role': ..., 'content': ...}")
    found = list(messages)
    return [found] if not found or isinstance(found[0], Mapping) else found


def listed_params(params: Params | Iterable[Params] | None, default: Params, count: int) -> list[Params]:
    """One for each of `count` prompts."""
    if params is None or isinstance(params, (SamplingParams, BeamSearchParams)):
        return [params or default] * count
    each: list[Any] = list(params) if isinstance(params, (list, tuple)) else [params]
    for one in each:
        if not isinstance(one, (SamplingParams, BeamSearchParams)):
            raise RequestError(f"params is a {type(one).__name__}", "Give SamplingParams or BeamSearchParams")
    if len(each) != count:
        raise UsageError(f"{len(each)} params for {count} prompts", "Give one for all or one for each")
    return each


def read_prompt(prompt: Any, tokenizer: Tokenizer | None) -> Read:
    text = None
    if isinstance(prompt, Mapping):
        text = prompt.get("prompt")
        prompt = prompt.get("prompt_token_ids", text)
    if isinstance(prompt, str):
        return prompt, required(tokenizer).encode(prompt)
    prompt = _plain(prompt)
    if isinstance(prompt, Mapping) or not isinstance(prompt, Iterable):
        raise RequestError(f"the prompt is a {type(prompt).__name__}", _FORMS)
    return text, [_number(item) for item in prompt]


def read_chat(messages: Messages, tokenizer: Tokenizer | None, template: Mapping[str, Any]) -> Read:
    known = required(tokenizer)
    return known.render_chat(messages, **template), known.apply_chat_template(messages, **template)


def is_chat(prompt: Any) -> bool:
    return isinstance(prompt, Sequence) and bool(prompt) and isinstance(prompt[0], Mapping)


def required(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        raise RequestError("the model has no tokenizer", "Give token ids: {'prompt_token_ids': [...]}")
    return tokenizer


def _plain(values: Any) -> Any:
    """An array's numbers as a list."""
    return values.tolist() if hasattr(values, "tolist") else values


def _number(item: Any) -> Any:
    """An integer of another library as Python's own; whatever is none is left to the session to refuse."""
    return int(item) if isinstance(item, Integral) and not isinstance(item, int) else item
