"""FastVLM: an image and a question in, an answer out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import mlx.core as mx

from fastvlm_mlx import prompt as prompts
from fastvlm_mlx.answer import AnswerReader, last_result, read_answer
from fastvlm_mlx.config import DOWNSAMPLING, ModelConfig
from fastvlm_mlx.engine import Engine
from fastvlm_mlx.errors import PromptError
from fastvlm_mlx.generation import resident
from fastvlm_mlx.image import check_view, image_list
from fastvlm_mlx.prompt import Span, Turn
from fastvlm_mlx.speculation import check_draft, speculate
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.tokenizer import Tokenizer
from fastvlm_mlx.types import (
    BATCH_SIZE,
    GenerationOptions,
    GenerationResult,
    ImageFeatures,
    OptionArgs,
    Piece,
    Prompt,
)

if TYPE_CHECKING:
    from fastvlm_mlx.chat import Chat
    from fastvlm_mlx.decoder import Decoder
    from fastvlm_mlx.pictures import Picture
    from fastvlm_mlx.types import ImageInput, ImageInputs


class FastVLM:
    """A loaded model; `fastvlm_mlx.load` makes one.

    Args:
        config: shapes, stop ids, defaults.
        engine: the decoder, the vision encoder and what they have computed before.
        tokenizer: None for a bundle without one, which takes prompts as ids only.
        resolution: side in pixels of the images that the encoder gets, a multiple of 64.
        identity: of the weights and their types; what was computed with others doesn't fit.

    Attributes:
        stop_ids: tokens that end an answer.
    """

    def __init__(
        self, config: ModelConfig, engine: Engine, tokenizer: Tokenizer | None, resolution: int, identity: str = ""
    ) -> None:
        self.config, self.resolution, self.identity = config, resolution, identity
        self.engine, self.tokenizer = engine, tokenizer
        self.stop_ids = set(config.eos_token_ids)
        if tokenizer:
            self.stop_ids |= tokenizer.stop_ids(prompts.STOP_TOKENS)

    @property
    def device(self) -> str:
        """What runs which part, such as "vision: MLX (gpu), decoder: MLX (gpu)"."""
        return f"vision: {self.engine.vision.device}, decoder: MLX ({mx.default_device().type.name})"

    @property
    def decoder(self) -> Decoder:
        """The language model."""
        return self.engine.decoder

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
        picture = self.open_images([image], resolution, aspect, clock)[0]
        return self.engine.vision.features(picture, clock)

    def open_images(
        self, images: Sequence[ImageInput], resolution: int | None, aspect: str | None, clock: Clock
    ) -> list[Picture]:
        """Read and identify images; they are encoded when a prompt needs them.

        Arguments and errors as `encode_image`; the time is added to `clock`.
        """
        side, aspect = self._view(resolution, aspect)
        pictures = [self.engine.vision.open(image, side, aspect) for image in images]
        clock.preprocess += clock.watch.lap()
        return pictures

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
            **options: max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, ignore_eos,
                kv_bits, kv_group_size, max_kv_size, prefill_step_size, progress, draft, num_draft_tokens; see
                `fastvlm_mlx.types.GenerationOptions`.

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
        spans = self.positions(prompt, tokens, system)
        clock.tokenize = clock.watch.lap()
        pictures = self.open_images(images, side, aspect, clock)
        yield from self.answer(spans, pictures, chosen, clock)

    def chat(
        self,
        images: ImageInputs = None,
        *,
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
        overflow: str = "error",
    ) -> Chat:
        """Start a conversation.

        Args:
            images: for the first question to show; one, several or None, as in `generate`.
            system: replaces the default system prompt; "" leaves the system turn out.
            resolution: side in pixels of the preprocessed images; default the model's.
            aspect: "pad", "crop" or "stretch"; default the model's.
            overflow: what happens when it no longer fits the context: "error", or "drop" the oldest questions and
                answers, but those that show an image.

        Raises:
            ImageError, ResolutionError, InputError: bad input. PromptError: the bundle has no tokenizer.
        """
        from fastvlm_mlx.chat import Chat

        return Chat(self, image_list(images), system, resolution, aspect, overflow)

    def load_chat(self, path: str | PathLike[str]) -> Chat:
        """Go on with a conversation that `Chat.save` wrote.

        Raises:
            InputError: no such file, damaged, or of a model with another tokenizer.
        """
        from fastvlm_mlx.chat_file import read_chat

        return read_chat(Path(path), self)

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
            ContextLengthError: the prompt fills the context, or `max_kv_size`. InputError: the draft has another
                tokenizer, or `kv_group_size` doesn't fit.
        """
        room = prompts.check_context(spans, self.config.context_length)
        engine, draft, most = self.engine, options.draft, min(options.max_tokens, room)
        if draft:
            check_draft(self.tokenizer, draft.tokenizer)
        with resident(self.decoder):
            prompt = engine.prefill(spans, pictures, options, clock)
            if draft:
                drafts = draft.engine
                tokens = speculate(
                    engine, prompt, drafts, lambda: drafts.prefill(spans, pictures, options, Clock()), options, most
                )
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

    def save_prefix(self, path: str | PathLike[str]) -> int:
        """Write what is known of earlier prompts, for a later process with the same model and types.

        Returns:
            How many positions were written.
        """
        from fastvlm_mlx.prefix_file import write_prefixes

        return write_prefixes(Path(path), self.engine.prefixes, self.identity)

    def load_prefix(self, path: str | PathLike[str]) -> int:
        """Know what `save_prefix` wrote: the same questions, or others about the same images, begin there.

        Returns:
            How many positions were read.

        Raises:
            InputError: no such file, damaged, or of another model, other types of weights or another encoder.
        """
        from fastvlm_mlx.prefix_file import read_prefixes

        return read_prefixes(Path(path), self.engine.prefixes, self.identity)

    def clear_cache(self) -> None:
        """Forget earlier prompts, answers and images, and give back their memory."""
        self.engine.prefixes.clear()
        self.engine.vision.cache.clear()
        mx.clear_cache()

    def batch(
        self,
        images: Sequence[ImageInputs],
        prompts: Prompt | Sequence[Prompt],
        *,
        batch_size: int = BATCH_SIZE,
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
        **options: Unpack[OptionArgs],
    ) -> list[GenerationResult]:
        """Answer many questions, several at a time: each decoder step then serves all of them.

        Args:
            images: what each question is about; each entry as in `generate`.
            prompts: a question for each, or one text for all.
            batch_size: most answers that are decoded together, >= 1.
            system: as in `generate`.
            resolution: as in `generate`.
            aspect: as in `generate`.
            **options: as in `generate`, but for kv_bits, max_kv_size and draft.

        Returns:
            Results in the order of the questions; greedy ones are those of `generate`.

        Raises:
            InputError and others: as `generate`, for the first question that is wrong, before anything is decoded.
        """
        from fastvlm_mlx.batch import decode_together, read_requests

        chosen = GenerationOptions(**options)
        requests = read_requests(self, images, prompts, system, self._view(resolution, aspect))
        done = dict(decode_together(self, iter(requests), chosen, batch_size))
        return [done[number] for number in range(len(requests))]

    def look(self, spans: Sequence[Span], pictures: Sequence[Picture]) -> None:
        """Compute and keep the rows of a prompt's beginning ahead of the question; nothing without a cache."""
        if self.engine.prefixes.max_bytes:
            with resident(self.decoder):
                self.engine.look(spans, pictures)

    def tokenize(self, turns: Sequence[Turn]) -> list[int]:
        """Ids of a conversation in ChatML, -200 for each `<image>` of the user's turns.

        Raises:
            PromptError: the bundle has no tokenizer.
        """
        return prompts.tokenize(turns, self.required_tokenizer())

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

    def positions(self, prompt: Prompt, image_tokens: Sequence[int], system: str | None) -> tuple[Span, ...]:
        """What stands where in a prompt, checked; arguments as in `generate`, with the tokens of each image."""
        if isinstance(prompt, str):
            return self.expand(self.tokenize(prompts.ask(prompt, len(image_tokens), system)), image_tokens)
        if prompt is None or isinstance(prompt, bytes):
            raise PromptError(f"a prompt is a text or a list of token ids, got {type(prompt).__name__}")
        return self.expand([int(token) for token in prompt], image_tokens)
