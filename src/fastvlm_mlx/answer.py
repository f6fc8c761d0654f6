"""From generated ids to text, pieces and the result."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set

import mlx.core as mx

from fastvlm_mlx.timing import Clock
from fastvlm_mlx.tokenizer import StopStrings, Tokenizer
from fastvlm_mlx.types import FinishReason, GenerationResult, Piece


def read_answer(
    ids: Iterator[int],
    tokenizer: Tokenizer | None,
    stop_ids: Set[int],
    stop_strings: Iterable[str],
    counts: tuple[int, int, int],
    clock: Clock,
    device: str,
) -> Iterator[Piece]:
    """Turn ids into pieces of text until a stop id, a stop string or the end of `ids`.

    Args:
        ids: generated ids, at least one.
        tokenizer: None gives empty texts.
        stop_ids: end the answer; they have no text.
        stop_strings: end the answer; they and what follows are left out.
        counts: positions of the prompt, how many of them are image positions, and how many were known before.
        clock: has the times up to the prefill.
        device: for the result.

    Yields:
        A piece per token, then one more that holds the text kept back until then and the result.
    """
    text = tokenizer.stream() if tokenizer else None
    stops = StopStrings(stop_strings)
    taken: list[int] = []
    shown: list[str] = []
    reason: FinishReason = "length"
    for token in ids:
        if not taken:
            clock.first_token, clock.ttft = clock.watch.lap(), clock.watch.total
        taken.append(token)
        if token in stop_ids:
            reason = "stop"
            break
        shown.append(stops.add(text.add(token)) if text else "")
        yield Piece(shown[-1], token)
        if stops.found:
            break
    clock.decode = clock.watch.total - clock.ttft
    if text and not stops.found:
        shown.append(stops.add(text.finish()) + stops.finish())
    else:
        shown.append("")
    if stops.found:
        reason = "stop"
    yield Piece(shown[-1], None, _result(tuple(taken), "".join(shown), reason, counts, clock, device))


def last_result(pieces: Iterable[Piece], show: Callable[[str], object] = lambda _: None) -> GenerationResult:
    """Run a stream to its end, passing each text on to `show`; returns the result."""
    result = None
    for piece in pieces:
        show(piece.text)
        result = piece.result
    if result is None:
        raise RuntimeError("a stream ended without a result")
    return result


def _result(
    ids: tuple[int, ...], text: str, reason: FinishReason, counts: tuple[int, int, int], clock: Clock, device: str
) -> GenerationResult:
    positions, image_positions, known = counts
    return GenerationResult(
        text=text,
        token_ids=ids,
        prompt_tokens=positions,
        image_tokens=image_positions,
        cached_tokens=known,
        generation_tokens=len(ids),
        prompt_tps=(positions - known) / clock.prefill if clock.prefill else 0.0,
        generation_tps=(len(ids) - 1) / clock.decode if clock.decode else 0.0,
        peak_memory=mx.get_peak_memory(),
        finish_reason=reason,
        timings=clock.finish(),
        device=device,
    )
