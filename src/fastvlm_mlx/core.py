"""What all ways of asking share: prompts to positions, images to pictures, positions to an answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import mlx.core as mx

from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.answer import AnswerReader, read_answer
from fastvlm_mlx.config import ModelConfig
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import ContextLengthError, PromptError
from fastvlm_mlx.generation import resident
from fastvlm_mlx.prompt import Span, Turn
from fastvlm_mlx.speculation import check_draft, speculate
from fastvlm_mlx.template import find_template
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.tokenizer import Tokenizer
from fastvlm_mlx.types import GenerationOptions, Piece, Prompt
from fastvlm_mlx.views import View, view_of

if TYPE_CHECKING:
    from fastvlm_mlx.decoder import Decoder
    from fastvlm_mlx.pictures import Picture
    from fastvlm_mlx.types import ImageInput


class Core:
    """A loaded model's parts, and what every question goes through.

    Args:
        config: shapes, stop ids, defaults.
        engine: the decoder, the vision encoder and what they have computed before.
        tokenizer: None for a bundle without one, which takes prompts as ids only.
        resolution: side in pixels of the images that the encoder gets, a multiple of 64 (FastViT: 32).
        weights: which ones, in which types.

    Attributes:
        template: how conversations are written.
        stop_ids: tokens that end an answer.

    Raises:
        ConfigError: the config names a template that this version doesn't know.
    """

    def __init__(
        self, config: ModelConfig, engine: Engine, tokenizer: Tokenizer | None, resolution: int, weights: str = ""
    ) -> None:
        self.config, self.resolution, self._weights = config, resolution, weights
        self.engine, self.tokenizer = engine, tokenizer
        self.template = find_template(config.template)
        self.stop_ids = set(config.eos_token_ids)
        if tokenizer:
            self.stop_ids |= tokenizer.stop_ids(self.template.stops)

    @property
    def device(self) -> str:
        """What runs which part, such as "vision: MLX (gpu), decoder: MLX (gpu)"."""
        return f"vision: {self.engine.vision.device}, decoder: MLX ({mx.default_device().type.name})"

    @property
    def identity(self) -> str:
        """What answers depend on besides the question: weights, their types, and what encodes images by now."""
        return f"{self._weights}, vision by {self.engine.vision.device}"

    @property
    def prefix_identity(self) -> str:
        """What kept rows depend on: as `identity`, but the same before and after MLX stood in for Core ML."""
        return f"{self._weights}, vision by {self.engine.vision.intended}"

    @property
    def decoder(self) -> Decoder:
        """The language model."""
        return self.engine.decoder

    def open_images(
        self,
        images: Sequence[ImageInput],
        resolution: int | None,
        aspect: str | None,
        clock: Clock,
        grid: str | None = None,
    ) -> list[Picture]:
        """Read and identify images; they are encoded when a prompt needs them.

        Arguments and errors as `encode_image`; the time is added to `clock`.
        """
        return self.open_as(images, self.view(resolution, aspect, grid), clock)

    def open_as(self, images: Sequence[ImageInput], view: View, clock: Clock) -> list[Picture]:
        """`open_images` in a checked view.

        Raises:
            ContextLengthError: they fill the context; what is left of them is then not even read.
        """
        pictures: list[Picture] = []
        taken, most = 0, self.config.context_length
        for image in images:
            pictures.append(self.engine.vision.open(image, view))
            taken += pictures[-1].tokens
            if taken >= most and len(images) > 1:
                raise ContextLengthError(
                    f"{len(pictures)} of {len(images)} images take {taken} positions, the model's context is {most}; "
                    "show fewer, or lower the resolution"
                )
        clock.preprocess += clock.watch.lap()
        return pictures

    def answer(
        self, spans: Sequence[Span], pictures: Sequence[Picture], options: GenerationOptions, clock: Clock
    ) -> Iterator[Piece]:
        """Compute what no earlier prompt had, and decode: `stream` after the prompt and its images are read.

        Args:
            spans: what stands where; images count with all their tokens.
            pictures: of `open_images`.
            options: how to decode.
            clock: times of the stages so far.

        Raises:
            ContextLengthError: the prompt fills the context, the draft's, or `max_kv_size`. InputError: the draft
                has another tokenizer, or `kv_group_size` doesn't fit. EncoderError: the draft can't see images.
        """
        room = prompts.check_context(spans, self.config.context_length)
        engine, draft, most = self.engine, options.draft, min(options.max_tokens, room)
        if draft:
            check_draft(self, draft, spans, pictures)
        with resident(self.decoder):
            prompt = engine.prefill(spans, pictures, options, clock)
            if draft:
                tokens = speculate(engine, prompt, draft.engine, spans, pictures, options, most)
            else:
                tokens = engine.decode(prompt, options, most)
            yield from read_answer(engine.keeping(prompt, tokens), self.reader(spans, prompt.known, options, clock))

    def reader(self, spans: Sequence[Span], known: int, options: GenerationOptions, clock: Clock) -> AnswerReader:
        """What turns the ids of an answer into text and a result.

        Args:
            spans: the prompt.
            known: positions that were not computed again.
            options: say what ends the answer.
            clock: times of the stages so far.
        """
        stops = set() if options.ignore_eos else self.stop_ids
        counts = (*prompts.count(spans), known)
        return AnswerReader(self.tokenizer, stops, options.stop, counts, clock, self.device)

    def look(self, spans: Sequence[Span], pictures: Sequence[Picture]) -> None:
        """Compute and keep the rows of a prompt's beginning ahead of the question; nothing without a cache."""
        if self.engine.prefixes.max_bytes:
            with resident(self.decoder):
                self.engine.look(spans, pictures)

    def tokenize(self, turns: Sequence[Turn], after: Sequence[Turn] | None = None) -> list[int]:
        """Ids of a conversation, -200 for each `<image>` of the user's turns; see `prompt.tokenize`.

        Raises:
            PromptError: the bundle has no tokenizer.
        """
        return prompts.tokenize(turns, self.required_tokenizer(), self.template, after)

    def required_tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            PromptError: the bundle has none.
        """
        if not self.tokenizer:
            raise PromptError(
                "this bundle has no tokenizer; give the prompt as token ids, "
                "or convert a checkpoint with tokenizer files"
            )
        return self.tokenizer

    def expand(self, ids: Sequence[int], image_tokens: Sequence[int]) -> tuple[Span, ...]:
        """Positions of a prompt, checked against images, vocabulary and context; see `prompt.expand`."""
        spans = prompts.expand(ids, image_tokens, self.config.decoder.vocab_size)
        prompts.check_context(spans, self.config.context_length)
        return spans

    def positions(self, prompt: Prompt, image_tokens: Sequence[int], system: str | None) -> tuple[Span, ...]:
        """What stands where in a prompt, checked; arguments as in `generate`, with the tokens of each image."""
        if isinstance(prompt, str):
            turns = prompts.ask(prompt, len(image_tokens), system, self.template)
            return self.expand(self.tokenize(turns), image_tokens)
        if prompt is None or isinstance(prompt, bytes):
            raise PromptError(f"a prompt is a text or a list of token ids, got {type(prompt).__name__}")
        return self.expand([int(token) for token in prompt], image_tokens)

    @staticmethod
    def start_clock() -> Clock:
        """Start the measurements of an answer: time, and the peak of memory."""
        mx.reset_peak_memory()
        return Clock()

    def view(self, resolution: int | None, aspect: str | None, grid: str | None = None) -> View:
        """Size and shape of a call's images, checked; by default the model's own. Errors as `views.view_of`."""
        return view_of(self.config, self.resolution if resolution is None else resolution, aspect, grid)
