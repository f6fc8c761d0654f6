"""FastVLM: an image and a question in, an answer out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Unpack

import mlx.core as mx
import numpy as np

from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.answer import last_result, read_answer
from fastvlm_mlx.config import DOWNSAMPLING, ModelConfig
from fastvlm_mlx.decoder import Decoder
from fastvlm_mlx.errors import EncoderError, PromptError
from fastvlm_mlx.generation import generate_tokens, resident
from fastvlm_mlx.image import check_view, image_list, preprocess
from fastvlm_mlx.prefill import embed, prefill
from fastvlm_mlx.projector import MLPProjector
from fastvlm_mlx.prompt import Span, TextSpan, Turn
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.tokenizer import Tokenizer
from fastvlm_mlx.types import (
    GenerationOptions,
    GenerationResult,
    ImageFeatures,
    OptionArgs,
    Piece,
    Prompt,
)
from fastvlm_mlx.vision.base import Encoder

if TYPE_CHECKING:
    from fastvlm_mlx.chat import Chat
    from fastvlm_mlx.types import ImageInput, ImageInputs


class FastVLM:
    """A loaded model; `fastvlm_mlx.load` makes one.

    Args:
        config: shapes, stop ids, defaults.
        encoder: runs FastViTHD; None for a bundle without vision weights, which answers text only.
        projector: features to embeddings.
        decoder: the language model.
        tokenizer: None for a bundle without one, which takes prompts as ids only.
        resolution: side in pixels of the images that the encoder gets, a multiple of 64.
    """

    def __init__(
        self,
        config: ModelConfig,
        encoder: Encoder | None,
        projector: MLPProjector,
        decoder: Decoder,
        tokenizer: Tokenizer | None,
        resolution: int,
    ) -> None:
        self.config, self.resolution = config, resolution
        self.tokenizer, self.decoder = tokenizer, decoder
        self._encoder, self._projector = encoder, projector
        self._stop_ids = set(config.eos_token_ids)
        if tokenizer:
            self._stop_ids |= tokenizer.stop_ids(prompts.STOP_TOKENS)

    @property
    def device(self) -> str:
        """What runs which part, such as "vision: MLX (gpu), decoder: MLX (gpu)"."""
        vision = self._encoder.device if self._encoder else "none"
        return f"vision: {vision}, decoder: MLX ({mx.default_device().type.name})"

    def encode_image(
        self, image: ImageInput, *, resolution: int | None = None, aspect: str | None = None
    ) -> ImageFeatures:
        """Encode one image; what `generate` computes before it looks at the prompt.

        Args:
            image: as in `fastvlm_mlx.image.preprocess`.
            resolution: side in pixels, a multiple of 64; default the model's.
            aspect: "pad", "crop" or "stretch"; default the model's.

        Returns:
            Features before, embeddings after the projector; both evaluated.

        Raises:
            ImageError, ResolutionError, InputError: bad input. EncoderError: no vision weights in the bundle.
        """
        clock = Clock()
        return self.encode_images([image], resolution, aspect, clock)[0]

    def encode_images(
        self, images: Sequence[ImageInput], resolution: int | None, aspect: str | None, clock: Clock
    ) -> list[ImageFeatures]:
        """Encode images one after another, so that memory doesn't grow with their number.

        Arguments and errors as `encode_image`; the stages' times are added to `clock`.
        """
        side, aspect = self._view(resolution, aspect)
        if not images:
            return []
        encoder = self._encoder
        if encoder is None:
            raise EncoderError(
                "this bundle has no vision weights for MLX (Apple's MLX exports hold them only as a Core ML "
                "package); convert the PyTorch checkpoint to ask about images"
            )
        pixels = [preprocess(image, side, aspect) for image in images]
        clock.preprocess = clock.watch.lap()
        return [self._features(encoder, array, clock) for array in pixels]

    def generate(
        self,
        image: ImageInputs,
        prompt: Prompt,
        *,
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
        **options: Unpack[OptionArgs],
    ) -> GenerationResult:
        """Answer a question about an image, several images, or none.

        Args:
            image: path, bytes, file object, PIL image, (H, W, 3) uint8 array, a list of those, or None.
            prompt: the question, or token ids used as given, with -200 for each image. In a text, `<image>`
                places an image; without any, the images come first.
            system: replaces the default system prompt; "" leaves the system turn out.
            resolution: side in pixels of the preprocessed image, a multiple of 64; default the model's.
            aspect: "pad", "crop" or "stretch"; default the model's.
            **options: max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop,
                ignore_eos; see `fastvlm_mlx.types.GenerationOptions`.

        Returns:
            The answer with its counts and timings; `str()` of it is the text.

        Raises:
            ImageError, ResolutionError, PromptError, ContextLengthError, InputError: bad input; nothing has
                been computed. EncoderError: an image, and the bundle has no vision weights.
        """
        pieces = self.stream(image, prompt, system=system, resolution=resolution, aspect=aspect, **options)
        return last_result(pieces)

    def stream(
        self,
        image: ImageInputs,
        prompt: Prompt,
        *,
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
        **options: Unpack[OptionArgs],
    ) -> Iterator[Piece]:
        """`generate`, piece by piece: each has `.text`, the last one has `.result`.

        Arguments and errors are those of `generate`; errors come when the first piece is asked for.
        """
        chosen = GenerationOptions(**options)
        clock = self.start_clock()
        images = image_list(image)
        side, aspect = self._view(resolution, aspect)
        tokens = [(side // DOWNSAMPLING) ** 2] * len(images)
        spans = self._spans(prompt, tokens, system)
        clock.tokenize = clock.watch.lap()
        features = self.encode_images(images, side, aspect, clock)
        yield from self.answer(spans, [f.embeddings for f in features], chosen, clock)

    def chat(
        self,
        images: ImageInputs = None,
        *,
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
    ) -> Chat:
        """Start a conversation about images, or without any; arguments as in `generate`.

        Raises:
            ImageError, ResolutionError, InputError: bad input. PromptError: the bundle has no tokenizer.
        """
        from fastvlm_mlx.chat import Chat

        return Chat(self, image_list(images), system, resolution, aspect)

    def answer(
        self, spans: Sequence[Span], images: Sequence[mx.array], options: GenerationOptions, clock: Clock
    ) -> Iterator[Piece]:
        """Prefill and decode: the part of `stream` after the images are encoded.

        Args:
            spans: what stands where; images count with all their tokens.
            images: (N, hidden) embeddings of each image.
            options: how to decode.
            clock: times of the stages so far.

        Raises:
            ContextLengthError: the prompt fills the context.
        """
        room = prompts.check_context(spans, self.config.context_length)
        with resident(self.decoder):
            cache = self.decoder.new_cache()
            logits = prefill(self.decoder, embed(self.decoder, spans, images), cache)
            mx.eval(logits)
            clock.prefill = clock.watch.lap()
            text_ids = [i for span in spans if isinstance(span, TextSpan) for i in span.ids]
            most = min(options.max_tokens, room)
            ids = generate_tokens(self.decoder, logits, cache, text_ids, options, most)
            stops = set() if options.ignore_eos else self._stop_ids
            yield from read_answer(ids, self.tokenizer, stops, options.stop, prompts.count(spans), clock, self.device)

    def tokenize(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation in ChatML, -200 for each `<image>` of the user's turns.

        Raises:
            PromptError: the bundle has no tokenizer.
        """
        if not self.tokenizer:
            raise PromptError(
                "this bundle has no tokenizer; give the prompt as token ids, "
                "or convert a checkpoint with tokenizer files"
            )
        return prompts.tokenize(turns, self.tokenizer)

    def expand(self, ids: Sequence[int], image_tokens: Sequence[int]) -> tuple[Span, ...]:
        """Positions of a prompt, checked against images, vocabulary and context; see `prompt.expand`."""
        spans = prompts.expand(ids, image_tokens, self.config.decoder.vocab_size)
        prompts.check_context(spans, self.config.context_length)
        return spans

    @staticmethod
    def start_clock() -> Clock:
        """Start the measurements of an answer: time, and the peak of memory."""
        mx.reset_peak_memory()
        return Clock()

    def _view(self, resolution: int | None, aspect: str | None) -> tuple[int, str]:
        """Side and aspect of a call, checked; the model's own where none is given."""
        view = (self.resolution if resolution is None else resolution, aspect or self.config.aspect)
        check_view(*view)
        return view

    def _spans(self, prompt: Prompt, image_tokens: Sequence[int], system: str | None) -> tuple[Span, ...]:
        """The prompt's positions, checked before anything is computed."""
        if isinstance(prompt, str):
            return self.expand(self.tokenize(prompts.ask(prompt, len(image_tokens), system)), image_tokens)
        if prompt is None or isinstance(prompt, bytes):
            raise PromptError(f"a prompt is a text or a list of token ids, got {type(prompt).__name__}")
        return self.expand([int(token) for token in prompt], image_tokens)

    def _features(self, encoder: Encoder, pixels: np.ndarray, clock: Clock) -> ImageFeatures:
        """(H, W, 3) uint8 -> features and embeddings, each evaluated so that its time is its own."""
        features = encoder.encode(pixels[None])
        mx.eval(features)
        clock.vision += clock.watch.lap()
        embeddings = self._projector(features)
        mx.eval(embeddings)
        clock.projector += clock.watch.lap()
        return ImageFeatures(features[0], embeddings[0], (pixels.shape[0], pixels.shape[1]))
