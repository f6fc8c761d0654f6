"""From generated ids to text, pieces and the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set

import mlx.core as mx

from fastvlm_mlx.timing import Clock
from fastvlm_mlx.tokenizer import StopStrings, Tokenizer
from fastvlm_mlx.types import FinishReason, GenerationResult, Piece


class AnswerReader:
    """Takes an answer's ids one by one and makes pieces of text, until it ends.

    Args:
        tokenizer: None gives empty texts.
        stop_ids: end the answer; they have no text.
        stop_strings: end the answer; they and what follows are left out.
        counts: positions of the prompt, how many of them are image positions, and how many were known before.
        clock: has the times up to the prefill.
        device: for the result.

    Attributes:
        ended: whether a stop id or a stop string came.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        stop_ids: Set[int],
        stop_strings: Iterable[str],
        counts: tuple[int, int, int],
        clock: Clock,
        device: str,
    ) -> None:
        self.ended = False
        self._text = tokenizer.stream() if tokenizer else None
        self._stop_ids, self._stops = stop_ids, StopStrings(stop_strings)
        self._counts, self._clock, self._device = counts, clock, device
        self._taken: list[int] = []
        self._shown: list[str] = []

    def add(self, token: int) -> Piece | None:
        """Take an id; returns its piece, None for a stop id."""
        if not self._taken:
            self._clock.first_token, self._clock.ttft = self._clock.watch.lap(), self._clock.watch.total
        self._taken.append(token)
        if token in self._stop_ids:
            self.ended = True
            return None
        self._shown.append(self._stops.add(self._text.add(token)) if self._text else "")
        self.ended = self._stops.found
        return Piece(self._shown[-1], token)

    def finish(self) -> Piece:
        """The last piece: the text kept back until then, and the result."""
        self._clock.decode = self._clock.watch.total - self._clock.ttft
        cut = self._stops.found or self._text is None
        self._shown.append("" if cut or not self._text else self._stops.add(self._text.finish()) + self._stops.finish())
        reason: FinishReason = "stop" if self.ended or self._stops.found else "length"
        return Piece(self._shown[-1], None, self._result("".join(self._shown), reason))

    def _result(self, text: str, reason: FinishReason) -> GenerationResult:
        positions, image_positions, known = self._counts
        clock, count = self._clock, len(self._taken)
        return GenerationResult(
            text=text,
            token_ids=tuple(self._taken),
            prompt_tokens=positions,
            image_tokens=image_positions,
            cached_tokens=known,
            generation_tokens=count,
            prompt_tps=(positions - known) / clock.prefill if clock.prefill else 0.0,
            generation_tps=(count - 1) / clock.decode if clock.decode else 0.0,
            peak_memory=mx.get_peak_memory(),
            finish_reason=reason,
            timings=clock.finish(),
            device=self._device,
        )


def read_answer(tokens: Iterator[int], reader: AnswerReader) -> Iterator[Piece]:
    """A piece per token until the answer ends, then one with the result.

    Args:
        tokens: at least one.
        reader: of this answer.
    """
    for token in tokens:
        piece = reader.add(token)
        if piece:
            yield piece
        if reader.ended:
            break
    yield reader.finish()


def last_result(pieces: Iterable[Piece], show: Callable[[str], object] = lambda _: None) -> GenerationResult:
    """Run a stream to its end, passing each text on to `show`; returns the result."""
    result = None
    for piece in pieces:
        show(piece.text)
        result = piece.result
    if result is None:
        raise RuntimeError("a stream ended without a result")
    return result
