"""Ids to text as they come; a character is held back until all of its bytes are there."""

from __future__ import annotations

import codecs
import re
from typing import Protocol

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

SPACE = "\u2581"  # SentencePiece's letter for a space
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # SentencePiece's token for a byte of a character that it doesn't know


class TextStream(Protocol):
    """Turns the ids of one text into its characters."""

    def add(self, token_id: int) -> str:
        """The text that this id completes, often empty."""
        ...

    def finish(self) -> str:
        """What was held back: a text may end in the middle of a character, which becomes U+FFFD."""
        ...


class WholeStream:
    """Of a tokenizer that decodes any ids, such as a byte-level one."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._shown = ""

    def add(self, token_id: int) -> str:
        """See `TextStream`."""
        self._ids.append(token_id)
        text = self._stream.step(self._backend, token_id) or ""
        self._shown += text
        return text

    def finish(self) -> str:
        """See `TextStream`."""
        whole = self._backend.decode(self._ids, skip_special_tokens=True)
        return whole[len(self._shown) :]


class ByteFallbackStream:
    """Of SentencePiece's vocabularies, which spell a character that they don't have in tokens of one byte each.

    `tokenizers` gives up a whole run of such tokens for one wrong byte, characters that were shown before included;
    here, as in SentencePiece, only what is wrong becomes U+FFFD.

    Args:
        backend: has the vocabulary.
        hidden: ids without text: special tokens.
        prefixed: a text's own first space is the tokenizer's, and not shown.
    """

    def __init__(self, backend: Backend, hidden: frozenset[int], prefixed: bool) -> None:
        self._backend, self._hidden = backend, hidden
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._strips = prefixed

    def add(self, token_id: int) -> str:
        """See `TextStream`."""
        piece = None if token_id in self._hidden else self._backend.id_to_token(token_id)
        if not piece:
            return ""
        if byte := _BYTE.fullmatch(piece):
            text = self._utf8.decode(bytes([int(byte[1], 16)]))
            self._strips = False
            return text
        text = piece.replace(SPACE, " ")
        if self._strips:
            text = text.removeprefix(" ")
        self._strips = False
        return self.finish() + text

    def finish(self) -> str:
        """See `TextStream`."""
        return self._utf8.decode(b"", final=True)
