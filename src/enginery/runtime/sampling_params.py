"""What a request may ask of the sampler, under the names that users of vLLM and the OpenAI API already type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import IntEnum

from enginery.errors import RequestError

MAX_CHOICES = 128
MAX_BEAM_WIDTH = 64
MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_LENGTH = 128
MAX_STOP_TOKENS = 256
MAX_BIASED_TOKENS = 1024
MAX_BAD_WORDS = 256
MAX_TOKENS = 2**31 - 1
MAX_TOP_K = 2**31 - 1


class RequestOutputKind(IntEnum):
    """Which outputs `Session.step` reports for a request."""

    CUMULATIVE = 0
    """After every token, everything generated so far."""
    DELTA = 1
    """After every token, only what is new."""
    FINAL_ONLY = 2
    """Once, when the request is finished; text is decoded only then."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. Every field is checked here, before anything is computed or allocated for the
    request.

    A temperature of 0 is greedy and ignores top_p, top_k and min_p. The order of processing is vLLM's: logit bias and
    bans, penalties, temperature, min_p, top_k, top_p. Logprobs are those of the model, before any of it.

    Raises:
        RequestError: a field is of the wrong type or out of its range; the message names both.
    """

    n: int = 1
    """Number of independent completions; the prompt is computed once."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1: all."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the output (CTRL, arXiv
    1909.05858)."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    """The same seed gives the same tokens, alone or in any batch. None: drawn by the session."""
    logprobs: int | None = None
    """Number of most likely tokens reported per position, the chosen one in addition; None: no logprobs."""
    prompt_logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    """None: up to the end of the context."""
    min_tokens: int = 0
    """Before that many tokens, end-of-sequence and stop tokens are banned and stop strings do not count."""
    bad_words: tuple[str, ...] = ()
    """Texts that must not appear; needs a tokenizer. Each is banned with and without a leading space."""
    skip_special_tokens: bool = True
    detokenize: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    skip_reading_prefix_cache: bool = False
    """Compute the whole prompt, whatever the cache holds."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", _strings("stop", self.stop))
        object.__setattr__(self, "bad_words", _strings("bad_words", self.bad_words))
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        _check_integer("n", self.n, 1, MAX_CHOICES)
        _check_number("temperature", self.temperature, 0.0, 100.0)
        _check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_integer("top_k", self.top_k, -1, MAX_TOP_K)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_optional_integer("seed", self.seed, -(2**63), 2**63 - 1)
        _check_optional_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_optional_integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        _check_optional_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_integer("min_tokens", self.min_tokens, 0, MAX_TOKENS if self.max_tokens is None else self.max_tokens)
        _check_count("stop", len(self.stop), MAX_STOPS)
        _check_count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKENS)
        _check_count("bad_words", len(self.bad_words), MAX_BAD_WORDS)
        for text in (*self.stop, *self.bad_words):
            _check_text("stop" if text in self.stop else "bad_words", text)
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize"):
            _check_bool(name, getattr(self, name))
        _check_bool("skip_reading_prefix_cache", self.skip_reading_prefix_cache)
        _check_bias(self.logit_bias)
        if self.stop and not self.detokenize:
            raise RequestError("stop needs the text of the output", "Set detokenize=True, or use stop_token_ids")

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search: the hypotheses of highest cumulative logprob / generated length ** length_penalty.

    The search is that of `transformers.generate(num_beams=beam_width)`, early stopping included.

    Raises:
        RequestError: a field is of the wrong type or out of its range.
    """

    beam_width: int
    max_tokens: int | None = 16
    n: int | None = None
    """Number of hypotheses returned, best first; None: beam_width."""
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    """True: stop at beam_width finished hypotheses; False: when the best beam cannot win at its present length;
    "never": when it cannot win at any length."""
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        _check_integer("beam_width", self.beam_width, 1, MAX_BEAM_WIDTH)
        _check_optional_integer("n", self.n, 1, self.beam_width)
        _check_optional_integer("max_tokens", self.max_tokens, 1, MAX_TOKENS)
        _check_number("length_penalty", self.length_penalty, -10.0, 10.0)
        _check_count("stop_token_ids", len(self.stop_token_ids), MAX_STOP_TOKENS)
        if self.early_stopping not in (True, False, "never"):
            raise RequestError(f"early_stopping={self.early_stopping!r}", 'It must be True, False or "never"')
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "detokenize"):
            _check_bool(name, getattr(self, name))


def final_only(params: SamplingParams | BeamSearchParams) -> SamplingParams | BeamSearchParams:
    """The same tokens, reported once, when the request is finished."""
    if isinstance(params, SamplingParams) and params.output_kind is not RequestOutputKind.FINAL_ONLY:
        return replace(params, output_kind=RequestOutputKind.FINAL_ONLY)
    return params


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise RequestError(f"{name}={_shown(value)} is out of range", f"{name} must be an integer from {low} to {high}")


def _check_optional_integer(name: str, value: object, low: int, high: int) -> None:
    if value is not None:
        _check_integer(name, value, low, high)


def _check_number(name: str, value: object, low: float, high: float, low_open: bool = False) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not low <= value <= high or (low_open and value == low):  # type: ignore[operator]
        above = "above" if low_open else "from"
        raise RequestError(f"{name}={_shown(value)} is out of range", f"{name} must be {above} {low:g} to {high:g}")


def _check_bool(name: str, value: object) -> None:
    if type(value) is not bool:
        raise RequestError(f"{name}={_shown(value)} is not a boolean", f"{name} must be true or false")


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise RequestError(f"{name} has {count} entries", f"At most {limit} are allowed")


def _check_text(name: str, text: str) -> None:
    if not 1 <= len(text) <= MAX_STOP_LENGTH:
        raise RequestError(f"an entry of {name} has {len(text)} characters", f"1 to {MAX_STOP_LENGTH} are allowed")


def _check_bias(bias: object) -> None:
    if bias is None:
        return
    if not isinstance(bias, Mapping):
        raise RequestError(f"logit_bias={_shown(bias)}", "It must map token ids to numbers from -100 to 100")
    _check_count("logit_bias", len(bias), MAX_BIASED_TOKENS)
    for token_id, value in bias.items():
        _check_integer("token id of logit_bias", token_id, 0, 2**31 - 1)
        _check_number("logit_bias", value, -100.0, 100.0)


def _strings(name: str, value: object) -> tuple[str, ...]:
    """One string, a sequence of strings or None, as a tuple."""
    if value is None:
        return ()
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)) or not all(type(text) is str for text in texts):
        raise RequestError(f"{name}={_shown(value)}", f"{name} must be a string or a list of strings")
    return tuple(texts)


def _token_ids(name: str, value: object) -> tuple[int, ...]:
    if value is None:
        return ()
    valid = isinstance(value, (list, tuple)) and all(type(item) is int and 0 <= item < 2**31 for item in value)
    if not valid:
        raise RequestError(f"{name}={_shown(value)}", f"{name} must be a list of token ids, from 0")
    return tuple(value)  # type: ignore[arg-type]


def _shown(value: object) -> str:
    """A value as an error may quote it: short, on one line."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value) if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__
    return text if len(text) <= 40 else text[:37] + "..."
