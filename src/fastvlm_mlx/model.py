"""FastVLM: an image and a question in, an answer out."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Unpack

import mlx.core as mx
import numpy as np

from fastvlm_mlx.answer import last_result
from fastvlm_mlx.core import Core
from fastvlm_mlx.files import file_at
from fastvlm_mlx.image import image_list
from fastvlm_mlx.timing import Clock
from fastvlm_mlx.types import (
    BATCH_SIZE,
    IMAGE_TOKEN_ID,
    GenerationOptions,
    GenerationResult,
    ImageFeatures,
    OptionArgs,
    Piece,
    Prompt,
)

if TYPE_CHECKING:
    from fastvlm_mlx.chat import Chat
    from fastvlm_mlx.types import ImageInput, ImageInputs
    from fastvlm_mlx.watch import FrameAnswer, FramePrompt


class FastVLM(Core):
    """A loaded model; `fastvlm_mlx.load` makes one."""

    def encode_image(
        self, image: ImageInput, *, resolution: int | None = None, aspect: str | None = None, grid: str | None = None
    ) -> ImageFeatures:
        """Encode one image; what `generate` computes before it looks at the prompt.

        Args:
            image: as in `fastvlm_mlx.image.preprocess`.
            resolution: side in pixels, a multiple of 64 (FastViT: 32); default the model's.
            aspect: "pad", "crop", "stretch", "native" or "anyres"; default the model's.
            grid: for "anyres", as in `generate`.

        Returns:
            Features before, embeddings after the projector; both evaluated.

        Raises:
            ImageError, ResolutionError, InputError: bad input. ContextLengthError: tiles that fill the context.
                EncoderError: no vision weights in the bundle. ConfigError: tiles that it can't merge.
        """
        clock = Clock()
        picture = self.open_images([image], resolution, aspect, clock, grid)[0]
        return self.engine.vision.features(picture, clock)

    def generate(
        self,
        image: ImageInputs,
        prompt: Prompt,
        *,
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
        grid: str | None = None,
        **options: Unpack[OptionArgs],
    ) -> GenerationResult:
        """Answer a question about an image, several images, or none.

        Args:
            image: path, bytes, file object, PIL image, (H, W, 3) uint8 array, Frame, a list of those, or None.
            prompt: the question, or token ids used as given, with -200 for each image. In a text, `<image>`
                places an image; without any, the images come first.
            system: replaces the default system prompt; "" leaves the system turn out.
            resolution: side in pixels of the preprocessed image, or of a tile, a multiple of 64 (FastViT: 32);
                default the model's.
            aspect: "pad", "crop", "stretch", "native" for the image's own shape, which no published model was trained
                for, or "anyres" for tiles beside the whole image; default the model's.
            grid: for "anyres", columns and rows of the tiles, such as "2x2"; default of the model's own grids the one
                that suits the image best.
            **options: max_tokens, temperature, top_p, top_k, min_p, repetition_penalty, seed, stop, ignore_eos,
                kv_bits, kv_group_size, max_kv_size, prefill_step_size, progress, draft, num_draft_tokens; see
                `fastvlm_mlx.types.GenerationOptions`.

        Returns:
            The answer with its counts and timings; `str()` of it is the text.

        Raises:
            ImageError, ResolutionError, PromptError, ContextLengthError, InputError: bad input; nothing has
                been computed. EncoderError: an image, and the bundle has no vision weights. ConfigError: tiles, and
                the bundle can't merge them.
        """
        pieces = self.stream(image, prompt, system=system, resolution=resolution, aspect=aspect, grid=grid, **options)
        return last_result(pieces)

    def stream(
        self,
        image: ImageInputs,
        prompt: Prompt,
        *,
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
        grid: str | None = None,
        **options: Unpack[OptionArgs],
    ) -> Iterator[Piece]:
        """`generate`, piece by piece: each has `.text`, the last one has `.result`.

        Arguments and errors are those of `generate`; errors come when the first piece is asked for.
        """
        chosen = GenerationOptions(**options)
        clock = self.start_clock()
        images = image_list(image)
        view = self.view(resolution, aspect, grid)
        # How many positions tiles take is known once the images are open; all else is checked before.
        pictures = self.open_as(images, view, clock) if view.tokens is None else []
        tokens = [picture.tokens for picture in pictures] or [view.tokens or 0] * len(images)
        spans = self.positions(prompt, tokens, system)
        clock.tokenize = clock.watch.lap()
        pictures = pictures or self.open_as(images, view, clock)
        yield from self.answer(spans, pictures, chosen, clock)

    def watch(
        self,
        frames: Iterable[ImageInput],
        prompt: FramePrompt,
        *,
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
        grid: str | None = None,
        **options: Unpack[OptionArgs],
    ) -> Generator[FrameAnswer, None, None]:
        """Ask about the newest frame of a live source, such as a camera, again and again.

        A thread reads the source as fast as it gives frames. Those that come while an answer is under way are dropped,
        all but the newest; the last one is always answered. Each is asked about for itself: the model doesn't see
        what came before, and a video isn't what the published weights were trained on.

        Args:
            frames: gives images, as in `generate`, which it doesn't change later. It sets the pace and is read ahead.
                One that can't be decoded is left out, logged by "fastvlm_mlx" and counted as dropped.
            prompt: the question, as in `generate`, or a function that gives it, called with each frame's number.
            system: as in `generate`.
            resolution: as in `generate`.
            aspect: as in `generate`.
            grid: as in `generate`.
            **options: as in `generate`.

        Yields:
            An answer for each frame that was asked about, with its latency. Of the frames before it the model and a
            draft keep nothing, but what something else has asked about, such as a chat about a frame. Closing the
            generator ends the reading; the source itself is left open.

        Raises:
            InputError and others: as `generate`. What the source raises, after its frames until then. ImageError: 100
                frames in a row can't be decoded, or all that there were.
        """
        from fastvlm_mlx.watch import watch

        chosen = GenerationOptions(**options)
        return watch(self, frames, prompt, system, self.view(resolution, aspect, grid), chosen)

    def chat(
        self,
        images: ImageInputs = None,
        *,
        system: str | None = None,
        resolution: int | None = None,
        aspect: str | None = None,
        grid: str | None = None,
        overflow: str = "error",
    ) -> Chat:
        """Start a conversation.

        Args:
            images: for the first question to show; one, several or None, as in `generate`.
            system: replaces the default system prompt; "" leaves the system turn out.
            resolution: side in pixels of the preprocessed images; default the model's.
            aspect: "pad", "crop", "stretch", "native" or "anyres"; default the model's.
            grid: for "anyres", as in `generate`.
            overflow: what happens when it no longer fits the context: "error", or "drop": a question does without
                the oldest ones and their answers, without those that show an image only as a last resort. So much
                is left out that `max_tokens` positions are free for the answer, or a quarter of the context if
                that is less. Nothing is forgotten: `undo` and `save` have everything.

        Raises:
            ImageError, ResolutionError, InputError: bad input. PromptError: the bundle has no tokenizer.
        """
        from fastvlm_mlx.chat import Chat

        return Chat(self, image_list(images), system, resolution, aspect, overflow, grid)

    def load_chat(
        self,
        path: str | PathLike[str],
        *,
        resolution: int | None = None,
        aspect: str | None = None,
        grid: str | None = None,
        overflow: str | None = None,
    ) -> Chat:
        """Go on with a conversation that `Chat.save` wrote.

        Args:
            path: of the file; `~` is the home folder.
            resolution: of images that are added from now on, as in `chat`; default that of the conversation.
            aspect: likewise.
            grid: likewise; without it another aspect has none.
            overflow: as in `chat`; default that of the conversation.

        Raises:
            InputError: no such file, damaged, or of a model with another tokenizer; a bad argument.
        """
        from fastvlm_mlx.chat_file import read_chat

        return read_chat(file_at(path), self, resolution, aspect, overflow, grid)

    def save_prefix(self, path: str | PathLike[str]) -> int:
        """Write what is known of earlier prompts, for a later process with the same model and types.

        Returns:
            How many positions were written.

        Raises:
            InputError: it can't be written there.
        """
        from fastvlm_mlx.prefix_file import write_prefixes

        return write_prefixes(file_at(path), self.engine.prefixes, self.prefix_identity)

    def load_prefix(self, path: str | PathLike[str]) -> int:
        """Know what `save_prefix` wrote: the same questions, or others about the same images, begin there.

        Returns:
            How many positions were read.

        Raises:
            InputError: no such file, damaged, or of another model, other types of weights or another encoder.
        """
        from fastvlm_mlx.prefix_file import read_prefixes

        return read_prefixes(file_at(path), self.engine.prefixes, self.prefix_identity)

    def warm_up(self) -> None:
        """Compute everything once, on a black image, and keep nothing of it."""
        side = self.resolution
        image = None if self.engine.vision.encoder is None else np.zeros((side, side, 3), np.uint8)
        self.generate(image, [0] if image is None else [IMAGE_TOKEN_ID, 0], max_tokens=2, ignore_eos=True)
        self.clear_cache()

    def clear_cache(self) -> None:
        """Forget earlier prompts, answers and images, and give back their memory."""
        self.engine.forget()
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
        grid: str | None = None,
        **options: Unpack[OptionArgs],
    ) -> list[GenerationResult]:
        """Answer many questions, several at a time: each decoder step then serves all of them.

        Args:
            images: what each question is about; each entry as in `generate`.
            prompts: a question for each, or one for all.
            batch_size: most answers that are decoded together, >= 1.
            system: as in `generate`.
            resolution: as in `generate`.
            aspect: as in `generate`.
            grid: as in `generate`.
            **options: as in `generate`, but for kv_bits, max_kv_size and draft.

        Returns:
            Results in the order of the questions; greedy ones are those of `generate`. The peak of memory is that of
            all of them until then.

        Raises:
            InputError and others: as `generate`, for the first question that is wrong, before anything is decoded.
                ImageError: later, for a file that goes or changes before its turn.
        """
        from fastvlm_mlx.batch import decode_together, read_requests

        chosen = GenerationOptions(**options)
        view = self.view(resolution, aspect, grid)
        requests = read_requests(self, images, prompts, system, view, batch_size)
        done = dict(decode_together(self, iter(requests), chosen, batch_size))
        return [done[number] for number in range(len(requests))]
