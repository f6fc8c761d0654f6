"""Text to ids and back, on Hugging Face tokenizers (10 ms to import; transformers takes over a second)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from fastvlm_mlx.errors import BundleError, PromptError


class Tokenizer:
    """A bundle's tokenizer."""

    def __init__(self, path: Path) -> None:
        """Read tokenizer.json.

        Raises:
            BundleError: missing or damaged.
        """
        try:
            self._backend = Backend.from_file(str(path))
        except Exception as exc:  # tokenizers raises bare Exception
            raise BundleError(f"can't read {path}: {exc}; convert or download the model again") from exc
        self._backend.encode_special_tokens = True  # the template's own are put in by their ids
        # Models pad their embedding beyond the tokenizer; the official code cuts it to this many rows.
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
                f"the bundle's tokenizer has no {token}; a ChatML prompt needs it, give token ids instead"
            )
        return index

    def stop_ids(self, tokens: Iterable[str]) -> set[int]:
        """Ids of those of these tokens that the vocabulary has."""
        return {index for token in tokens if (index := self._backend.token_to_id(token)) is not None}

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: the spelling of a special token is text like any other.

        Raises:
            PromptError: the text holds bytes that are no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as exc:  # a terminal passes such bytes on as lone surrogates
            raise PromptError("the text isn't valid UTF-8; check the encoding of where it comes from") from exc
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)

    def stream(self) -> TextStream:
        """A decoder for ids that come one by one."""
        return TextStream(self._backend)


class TextStream:
    """Turns ids into text as they come; a character is held back until all of its bytes are there."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token_id: int) -> str:
        """The text that this id completes, often empty."""
        self._ids.append(token_id)
        text = self._stream.step(self._backend, token_id) or ""
        self._shown += text
        return text

    def finish(self) -> str:
        """What was held back: an answer may end in the middle of a character, which becomes U+FFFD."""
        whole = self._backend.decode(self._ids, skip_special_tokens=True)
        return whole[len(self._shown) :]


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
