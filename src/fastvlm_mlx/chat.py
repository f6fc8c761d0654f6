"""A conversation: the images are encoded once, every question sees all turns before it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Unpack

from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.answer import last_result
from fastvlm_mlx.prompt import Turn
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import GenerationOptions, GenerationResult, ImageFeatures, OptionArgs, Piece

if TYPE_CHECKING:
    from fastvlm_mlx.model import FastVLM
    from fastvlm_mlx.types import ImageInput


class Chat:
    """Made by `FastVLM.chat`. Turns count once they are answered to the end."""

    def __init__(
        self,
        model: FastVLM,
        images: Sequence[ImageInput],
        system: str | None,
        resolution: int | None,
        aspect: str | None,
    ) -> None:
        self._model = model
        self._features: list[ImageFeatures] = model.encode_images(images, resolution, aspect, Clock())
        self._unplaced = len(self._features)  # images that no question has shown yet
        self._turns = prompts.system_turn(system)

    @property
    def turns(self) -> tuple[Turn, ...]:
        """What was said so far, the system turn included."""
        return tuple(self._turns)

    def ask(self, question: str, **options: Unpack[OptionArgs]) -> GenerationResult:
        """Ask, and wait for the whole answer.

        Args:
            question: the first one shows the images, where `<image>` stands or before its text.
            **options: as in `FastVLM.generate`.

        Raises:
            PromptError: placeholders and images differ. ContextLengthError: the conversation is too long;
                InputError: an option is out of range. The conversation is then as before.
        """
        return last_result(self.stream(question, **options))

    def stream(self, question: str, **options: Unpack[OptionArgs]) -> Iterator[Piece]:
        """`ask`, piece by piece. An answer that isn't read to its end leaves the conversation as it was."""
        chosen = GenerationOptions(**options)
        clock = self._model.start_clock()
        asked = Turn("user", prompts.place_images(question, self._unplaced))
        ids = self._model.tokenize([*self._turns, asked, Turn("assistant", None)])
        embeddings = [features.embeddings for features in self._features]
        spans = self._model.expand(ids, [len(rows) for rows in embeddings])
        clock.tokenize = clock.watch.lap()
        for piece in self._model.answer(spans, embeddings, chosen, clock):
            if piece.result:
                self._turns += [asked, Turn("assistant", piece.result.text)]
                self._unplaced = 0
            yield piece
