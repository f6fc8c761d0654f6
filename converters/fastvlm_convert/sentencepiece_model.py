"""LLaMA's tokenizer.model, a SentencePiece model, as a tokenizer of Hugging Face tokenizers.

SentencePiece joins the two neighbours whose piece has the best score, the leftmost first; byte pair encoding joins
the pair of the first rule. So the rules are all the ways to make each piece of two others, in the order of the
scores. Characters that the vocabulary lacks are spelled in bytes. A text begins with a space of the tokenizer's own.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from fastvlm_mlx.detokenizer import SPACE
from fastvlm_mlx.errors import CheckpointError, MissingDependencyError

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

_CHECKED = (  # besides each piece's own text
    "", " ", "  ", " a ", "\n", "\nDescribe the image.", "a  b   c\t\td\r\n\n",
    "USER: What's in it? ASSISTANT: 1,234.5", "naïve ﬁ e\u0301",
    "你好 Привет 😀 \x00\x7f", "▁x ▁ </s><s><unk><0x41>",
)  # fmt: skip


def read_sentencepiece(path: Path) -> Tokenizer:
    """Read a model, and check that its texts have the same ids in both.

    Args:
        path: of a byte-pair model with byte fallback, without normalisation: LLaMA's kind.

    Raises:
        CheckpointError: damaged, or of another kind. MissingDependencyError: the package sentencepiece is missing.
    """
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as exc:
        raise MissingDependencyError(
            f"{path.name} needs sentencepiece to be read: pip install 'fastvlm-mlx[convert]'"
        ) from exc
    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError, ValueError) as exc:
        raise CheckpointError(f"{path} is damaged or no SentencePiece model ({exc}); download it again") from exc
    tokenizer = _build(model)
    _check(tokenizer, model, path)
    return tokenizer


def _build(model: SentencePieceProcessor) -> Tokenizer:
    count = model.get_piece_size()
    pieces = [model.id_to_piece(index) for index in range(count)]
    special = [p for index, p in enumerate(pieces) if model.is_control(index) or model.is_unknown(index)]
    ordinary = {
        p: model.get_score(index)
        for index, p in enumerate(pieces)
        if not (p in special or model.is_byte(index) or model.is_unused(index))
    }
    ranked = sorted(ordinary, key=lambda piece: -ordinary[piece])  # equal scores stay in the order of their ids
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: index for index, piece in enumerate(pieces)},
            merges=[pair for piece in ranked for pair in _pairs(piece) if all(part in ordinary for part in pair)],
            unk_token=pieces[model.unk_id()],
            fuse_unk=True,
            byte_fallback=any(map(model.is_byte, range(count))),
        )
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    return tokenizer


def _pairs(piece: str) -> list[tuple[str, str]]:
    """All ways to cut a piece in two."""
    return [(piece[:place], piece[place:]) for place in range(1, len(piece))]


def _check(tokenizer: Tokenizer, model: SentencePieceProcessor, path: Path) -> None:
    """Raise CheckpointError unless both have the same ids for some texts and for every piece's own."""
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True  # SentencePiece takes the spelling of a special token for text
    pieces = (model.id_to_piece(index).replace(SPACE, " ") for index in range(model.get_piece_size()))
    for text in itertools.chain(_CHECKED, pieces):
        found, right = plain.encode(text, add_special_tokens=False).ids, model.encode(text)
        if found != right:
            raise CheckpointError(
                f"{path} isn't LLaMA's kind of SentencePiece model: {text!r} has the ids {right} there and {found} by "
                "byte pair encoding with byte fallback; give a tokenizer.json instead"
            )
