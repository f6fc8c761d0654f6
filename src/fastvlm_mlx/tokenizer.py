"""Text to ids and back, on Hugging Face tokenizers (10 ms to import; transformers takes over a second)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeAlias

from tokenizers import Tokenizer as Backend

from fastvlm_mlx.detokenizer import ByteFallbackStream, TextStream, WholeStream
from fastvlm_mlx.errors import BundleError, PromptError

Place: TypeAlias = Literal["start", "special", "text"]


class Tokenizer:
    """A bundle's tokenizer.

    Attributes:
        size: ids that the vocabulary has; models pad their embedding beyond, the official code cuts it to this many.
    """

    def __init__(self, path: Path, prefix_after_special: bool = True) -> None:
        """Read tokenizer.json.

        Args:
            path: of the file.
            prefix_after_special: SentencePiece's tokenizers begin a text with a space of their own; whether they do so
                behind a special token, too.

        Raises:
            BundleError: missing or damaged.
        """
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as exc:  # tokenizers raises bare Exception
            raise BundleError(f"can't read {path}: {exc}; convert or download the model again") from exc
        self._backend.encode_special_tokens = True  # the template's own are put in by their ids
        self._prefix_after_special = prefix_after_special
        self.size = self._backend.get_vocab_size(with_added_tokens=True)

    def same_as(self, other: Tokenizer) -> bool:
        """Whether an id is the same text in both."""
        return self.digest == other.digest

    @property
    def digest(self) -> str:
        """Of what each id stands for."""
        vocabulary = sorted(self._backend.get_vocab().items(), key=lambda entry: entry[1])
        return sha256(repr(vocabulary).encode()).hexdigest()

    def special_id(self, token: str) -> int:
        """Id of a special token such as "<|im_end|>".

        Raises:
            BundleError: the tokenizer hasn't got it.
        """
        index = self._backend.token_to_id(token)
        if index is None:
            raise BundleError(
                f"the bundle's tokenizer has no {token}, which the template of its prompts needs; give token ids "
                "instead, or convert the checkpoint with another --template"
            )
        return index

    def stop_ids(self, tokens: Iterable[str]) -> set[int]:
        """Ids of those of these tokens that the vocabulary has."""
        return {index for token in tokens if (index := self._backend.token_to_id(token)) is not None}

    def encode(self, text: str, place: Place = "start") -> list[int]:
        """Ids of plain text: the spelling of a special token is text like any other.

        Args:
            text: any.
            place: where it stands: at the "start" of a prompt, or behind an image, whose texts are tokenised each on
                its own; behind a "special" token; or within "text" that goes on. It decides whether SentencePiece's
                tokenizers begin it with a space of their own; others know no difference.

        Raises:
            PromptError: the text holds bytes that are no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as exc:  # a terminal passes such bytes on as lone surrogates
            raise PromptError("the text isn't valid UTF-8; check the encoding of where it comes from") from exc
        prefixed = place == "start" or (place == "special" and self._prefix_after_special) or not self._has_prefix
        backend = self._backend if prefixed else self._without_prefix
        return backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        if not self._falls_back:
            return self._backend.decode(list(ids), skip_special_tokens=True)
        stream = self.stream()
        return "".join([*map(stream.add, ids), stream.finish()])

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        if self._falls_back:
            return ByteFallbackStream(self._backend, self._special_ids, self._has_prefix)
        return WholeStream(self._backend)

    @cached_property
    def _falls_back(self) -> bool:
        """Whether characters that the vocabulary lacks are spelled in bytes."""
        return bool(getattr(self._backend.model, "byte_fallback", False))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        return frozenset(i for i, token in self._backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def _has_prefix(self) -> bool:
        """Whether a text is begun with a space that it doesn't have."""
        normalizer, splitter = self._backend.normalizer, self._backend.pre_tokenizer
        text = normalizer.normalize_str("x") if normalizer else "x"
        return (splitter.pre_tokenize_str(text)[0][0] if splitter else text) != "x"

    @cached_property
    def _without_prefix(self) -> Backend:
        """The same tokenizer, which adds no space."""
        parts = json.loads(self._backend.to_str())
        parts = parts | {name: _unprefixed(parts[name]) for name in ("normalizer", "pre_tokenizer")}
        backend = Backend.from_str(json.dumps(parts))
        backend.encode_special_tokens = True
        return backend


def _unprefixed(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """A normaliser or pre-tokenizer as tokenizer.json has it, without what puts a space before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    lists = {name: part[name] for name in ("normalizers", "pretokenizers") if name in part}
    return part | {name: [p for p in map(_unprefixed, inner) if p is not None] for name, inner in lists.items()}


class StopStrings:
    """Cuts text before the first stop string; holds back what might become one."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Take new text, give what is safe to show; `found` says that a stop string ended the answer."""
        if not self._stops:
            return text
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = max(_overlap(self._held, stop) for stop in self._stops)
        safe = len(self._held) - keep
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def finish(self) -> str:
        """What was held back in vain."""
        return "" if self.found else self._held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
