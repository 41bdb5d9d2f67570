"""Turns what a caller asks for into a `Request`, or into one error, before anything is allocated for it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import numpy as np

from enginery.engine.protocol import EngineLimits
from enginery.errors import RequestError
from enginery.runtime.beam_search import num_candidates
from enginery.runtime.detokenizer import Tokenizer
from enginery.runtime.outputs import RequestMetrics
from enginery.runtime.request import Request
from enginery.runtime.sampling_params import BeamSearchParams, SamplingParams

MAX_SALT_LENGTH = 256
MAX_REQUEST_ID_LENGTH = 128
MAX_PRIORITY = 2**31
MORE = "or raise --max-model-len if the model takes more"


class Intake:
    """Checks requests against one engine's limits."""

    def __init__(self, limits: EngineLimits, tokenizer: Tokenizer | None, eos_token_ids: tuple[int, ...]) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._eos_token_ids = eos_token_ids

    def request(
        self,
        prompt_token_ids: Iterable[int],
        params: SamplingParams | BeamSearchParams,
        *,
        request_id: str,
        number: int,
        priority: int,
        salt: str,
        prompt: str | None,
    ) -> Request:
        """The checked request, without its sequences, seed and cache root.

        Raises:
            RequestError: the prompt, the parameters or their sum are beyond what this engine can do.
        """
        if not isinstance(params, (SamplingParams, BeamSearchParams)):
            raise RequestError(f"params is a {type(params).__name__}", "Give SamplingParams or BeamSearchParams")
        _check_labels(request_id, priority, salt)
        tokens = self._checked_prompt(prompt_token_ids)
        request = Request(
            request_id=request_id,
            number=number,
            prompt_token_ids=tokens,
            params=params,
            max_tokens=self._max_tokens(len(tokens), params.max_tokens),
            stop_token_ids=frozenset(params.stop_token_ids + (() if params.ignore_eos else self._eos_token_ids)),
            metrics=RequestMetrics(arrival_time=time.monotonic()),
            priority=priority,
            prompt=prompt,
        )
        self._check_token_ids("stop_token_ids", params.stop_token_ids)
        if isinstance(params, SamplingParams):
            self._set_sampling(request, params)
        else:
            wanted = num_candidates(params.beam_width, len(request.stop_token_ids))
            request.num_forks = params.beam_width - 1
            request.num_beam_candidates = min(wanted, self._limits.vocab_size)
        return request

    def _checked_prompt(self, prompt_token_ids: Iterable[int]) -> list[int]:
        if isinstance(prompt_token_ids, np.ndarray) and np.issubdtype(prompt_token_ids.dtype, np.integer):
            prompt_token_ids = prompt_token_ids.tolist()
        if not isinstance(prompt_token_ids, (list, tuple)):
            raise RequestError(f"the prompt is a {type(prompt_token_ids).__name__}", "Give a list of token ids")
        if not prompt_token_ids:
            raise RequestError("the prompt is empty", "Give at least one token")
        longest = self._limits.max_model_len
        if len(prompt_token_ids) >= longest:
            raise RequestError(
                f"the maximum context length is {longest} tokens, but the prompt has {len(prompt_token_ids)}",
                f"Shorten it to at most {longest - 1}, {MORE}",
            )
        if set(map(type, prompt_token_ids)) != {int}:
            wrong = next(item for item in prompt_token_ids if type(item) is not int)
            raise RequestError(f"the prompt holds a {type(wrong).__name__} where a token id is due", "Give integers")
        self._check_token_ids("the prompt", prompt_token_ids)
        return list(prompt_token_ids)

    def _max_tokens(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        longest = self._limits.max_model_len
        fitting = self._limits.num_blocks * self._limits.block_size
        total = num_prompt_tokens + (max_tokens or 1)
        if total > longest:
            raise RequestError(
                f"the maximum context length is {longest} tokens, but prompt and max_tokens make "
                f"{num_prompt_tokens} + {max_tokens} = {total}",
                f"Set max_tokens to at most {longest - num_prompt_tokens}, {MORE}",
            )
        if total > fitting:
            raise RequestError(
                f"KV memory holds {fitting} tokens, but this request needs {total}",
                f"Ask for at most {fitting} tokens of prompt and max_tokens together, or raise --kv-cache-memory",
            )
        return max_tokens or min(longest, fitting) - num_prompt_tokens

    def _check_token_ids(self, name: str, token_ids: Any) -> None:
        vocab_size = self._limits.vocab_size
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
            raise RequestError(
                f"token id {wrong} of {name} is out of range", f"Token ids go from 0 to {vocab_size - 1}"
            )

    def _set_sampling(self, request: Request, params: SamplingParams) -> None:
        self._check_token_ids("logit_bias", params.logit_bias)
        if self._tokenizer is None and (params.stop or params.bad_words):
            raise RequestError("stop and bad_words need a tokenizer", "Use stop_token_ids and logit_bias")
        request.num_choices = params.n
        request.num_forks = params.n - 1
        request.wants_prompt_logprobs = params.prompt_logprobs is not None
        request.reads_prefix_cache = not (request.wants_prompt_logprobs or params.skip_reading_prefix_cache)
        if request.wants_prompt_logprobs:
            request.prompt_logprobs = [None] * request.num_prompt_tokens
        if params.logit_bias:
            request.bias = (
                np.fromiter(params.logit_bias.keys(), np.int64),
                np.fromiter(params.logit_bias.values(), np.float32),
            )
        request.bad_word_ids = self._bad_word_ids(params)
        bans_stops = params.min_tokens > 0 and bool(request.stop_token_ids)
        request.has_edits = bool(request.bias or request.bad_word_ids or bans_stops or params.has_penalties)

    def _bad_word_ids(self, params: SamplingParams) -> tuple[list[int], ...]:
        """Each word as the tokens it has at the beginning of a text and after a space."""
        if self._tokenizer is None:
            return ()
        spellings: dict[tuple[int, ...], None] = {}
        for word in params.bad_words:
            for text in (word.lstrip(), " " + word.lstrip()):
                token_ids = tuple(self._tokenizer.encode(text, add_special_tokens=False))
                if token_ids:
                    spellings[token_ids] = None
        return tuple(list(token_ids) for token_ids in spellings)


def _check_labels(request_id: str, priority: int, salt: str) -> None:
    if not isinstance(request_id, str) or not 1 <= len(request_id) <= MAX_REQUEST_ID_LENGTH:
        raise RequestError("request_id is not usable", f"Give a string of 1 to {MAX_REQUEST_ID_LENGTH} characters")
    if not isinstance(priority, int) or abs(priority) > MAX_PRIORITY:
        raise RequestError("priority is not usable", "Give an integer; smaller is served first")
    if not isinstance(salt, str) or len(salt) > MAX_SALT_LENGTH:
        raise RequestError("salt is not usable", f"Give a string of at most {MAX_SALT_LENGTH} characters")
