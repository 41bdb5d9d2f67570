"""What a caller sees of one request: the text, logprobs and end of each completion."""

from __future__ import annotations

from enginery.runtime.beam_search import BeamSearch, Hypothesis
from enginery.runtime.detokenizer import Detokenizer, Tokenizer
from enginery.runtime.outputs import CompletionOutput, FinishReason, RequestOutput
from enginery.runtime.request import Request, Sequence
from enginery.runtime.sampling_params import BeamSearchParams, RequestOutputKind, SamplingParams
from enginery.runtime.stop_strings import OutputText, StopStrings


class Completion:
    """One sequence as the caller sees it. Without a tokenizer it has no text; with one, the text is decoded at the end
    or, if it is followed, token by token."""

    __slots__ = ("_decoder", "_num_taken", "_params", "_sequence", "_text", "_tokenizer", "_was_finished")

    def __init__(
        self, sequence: Sequence, tokenizer: Tokenizer | None, params: SamplingParams, follows_text: bool
    ) -> None:
        self._sequence = sequence
        self._params = params
        self._tokenizer = tokenizer if params.detokenize else None
        self._num_taken = 0
        self._was_finished = False
        self._text: OutputText | None = None
        self._decoder: Detokenizer | None = None
        if self._tokenizer is not None and follows_text:
            self._text = OutputText(StopStrings(params.stop), params.include_stop_str_in_output)
            self._decoder = Detokenizer(self._tokenizer, params.skip_special_tokens)

    @property
    def is_new(self) -> bool:
        """Whether something happened since the last output of what is new."""
        sequence = self._sequence
        num_output = len(sequence.token_ids) - len(sequence.request.prompt_token_ids)
        return num_output > self._num_taken or (sequence.finish_reason is not None and not self._was_finished)

    def output(self, kind: RequestOutputKind) -> CompletionOutput:
        sequence = self._sequence
        start = first = len(sequence.request.prompt_token_ids)
        is_delta = kind is RequestOutputKind.DELTA
        if is_delta:
            start += self._num_taken
            self._num_taken = len(sequence.token_ids) - first
            self._was_finished = sequence.finish_reason is not None
        logprobs = sequence.logprobs
        return CompletionOutput(
            sequence.index,
            "" if self._tokenizer is None else self._output_text(self._tokenizer, is_delta),
            sequence.token_ids[start:],
            None if logprobs is None else sequence.cumulative_logprob,
            None if logprobs is None else logprobs[start - first :],
            sequence.finish_reason,
            sequence.stop_reason,
            sequence.error,
        )

    def close(self) -> None:
        """The completion ends without another token (cancelled or failed): what is held back is shown."""
        if self._decoder is not None and self._text is not None and not self._text.is_final:
            self._text.add(self._decoder.flush(), may_stop=False)
            self._text.is_final = True

    def extend_text(self, token_id: int) -> None:
        """The sequence got this token (already its last): its text may end it, too."""
        text, decoder = self._text, self._decoder
        if text is None or decoder is None:
            return
        sequence = self._sequence
        params = self._params
        ends_by_token = sequence.finish_reason == "stop"
        new = "" if ends_by_token and not params.include_stop_str_in_output else decoder.push(token_id)
        if sequence.finish_reason is not None:
            new += decoder.flush()
        stop = text.add(new, may_stop=sequence.num_output_tokens > params.min_tokens)
        if stop is not None and not ends_by_token:
            sequence.finish_reason, sequence.stop_reason = "stop", stop
        text.is_final = sequence.finish_reason is not None

    def _output_text(self, tokenizer: Tokenizer, is_delta: bool) -> str:
        if self._text is None:
            return final_text(self._sequence, self._sequence.output_token_ids, tokenizer)
        return self._text.take() if is_delta else self._text.visible


def final_text(sequence: Sequence, token_ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of a whole output, without the stop token that ended it."""
    params = sequence.request.params
    if token_ids and token_ids[-1] in sequence.request.stop_token_ids and not params.include_stop_str_in_output:
        token_ids = token_ids[:-1]
    return tokenizer.decode(token_ids, skip_special_tokens=params.skip_special_tokens)


class Response:
    """All completions of one request, or its beam search."""

    __slots__ = ("_completions", "_params", "_tokenizer", "follows_text", "is_streamed", "request", "search")

    def __init__(self, request: Request, tokenizer: Tokenizer | None) -> None:
        self.request = request
        self.search: BeamSearch | None = None
        self._tokenizer = tokenizer
        self._completions: list[Completion] = []
        self.is_streamed = False
        """There is an output after every step, not only at the end."""
        self.follows_text = False
        """Text is decoded token by token: it is streamed, or may hold a stop string."""
        params = request.params
        if isinstance(params, BeamSearchParams):
            self.search = BeamSearch(request, params)
        else:
            self._params = params
            self.is_streamed = params.output_kind is not RequestOutputKind.FINAL_ONLY
            self.follows_text = tokenizer is not None and params.detokenize and bool(self.is_streamed or params.stop)

    def extend_text(self, sequence: Sequence, token_id: int) -> None:
        self._completion(sequence).extend_text(token_id)

    def close(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """Ends a sequence for another cause than its tokens."""
        sequence.finish_reason = reason
        sequence.error = error
        if self.search is None:
            self._completion(sequence).close()

    def output(self, finished: bool) -> RequestOutput | None:
        """What is to be reported after a step; None if nothing is."""
        request = self.request
        completions = self._beams(finished) if self.search is not None else self._sampled(finished)
        if not completions:
            return None
        return RequestOutput(
            request.request_id,
            request.prompt,
            request.prompt_token_ids,
            request.prompt_logprobs if request.is_prefilled else None,
            completions,
            finished,
            request.num_cached_tokens or 0,
            request.metrics,
        )

    def _completion(self, sequence: Sequence) -> Completion:
        completions = self._completions
        while len(completions) <= sequence.index:
            following = self.request.sequences[len(completions)]
            completions.append(Completion(following, self._tokenizer, self._params, self.follows_text))
        return completions[sequence.index]

    def _sampled(self, finished: bool) -> list[CompletionOutput]:
        if not (finished or self.is_streamed):
            return []
        kind = self._params.output_kind
        completions = [self._completion(sequence) for sequence in self.request.sequences]
        if kind is RequestOutputKind.DELTA:
            return [completion.output(kind) for completion in completions if completion.is_new]
        return [completion.output(kind) for completion in completions]

    def _beams(self, finished: bool) -> list[CompletionOutput]:
        if not finished or self.search is None:
            return []
        root = self.request.sequences[0]
        if root.finish_reason in ("abort", "error"):
            return [CompletionOutput(0, "", [], finish_reason=root.finish_reason, error=root.error)]
        params = self.request.params
        count = params.n or len(self.search.hypotheses)
        return [self._hypothesis(root, index, h) for index, h in enumerate(self.search.hypotheses[:count])]

    def _hypothesis(self, root: Sequence, index: int, hypothesis: Hypothesis) -> CompletionOutput:
        params = self.request.params
        reads_text = self._tokenizer is not None and params.detokenize
        return CompletionOutput(
            index=index,
            text=final_text(root, hypothesis.token_ids, self._tokenizer) if reads_text and self._tokenizer else "",
            token_ids=hypothesis.token_ids,
            cumulative_logprob=hypothesis.cumulative_logprob,
            finish_reason="length" if hypothesis.ended_by is None else "stop",
            stop_reason=hypothesis.ended_by if hypothesis.ended_by in params.stop_token_ids else None,
        )
