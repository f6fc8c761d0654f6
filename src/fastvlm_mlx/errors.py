"""Everything this library raises on purpose.

FastVLMError
├── InputError               an argument or a file of the caller's
│   ├── ImageError           not an image, unreadable, or too large to decode
│   ├── PromptError          placeholders and images differ, no tokenizer, an id out of range
│   ├── ResolutionError      not a multiple of 64 (FastViT: 32), or unknown to the encoder
│   └── ContextLengthError   prompt longer than the model's context
├── ConfigError              a config.json with unknown, missing or impossible values
├── WeightsError             tensors missing, unexpected or of another shape (one error lists all)
├── BundleError              not a bundle, a newer format, a damaged file
├── CheckpointError          a source checkpoint that can't be read
├── DiskSpaceError           the output doesn't fit
├── MissingDependencyError   an optional package is needed; the message has the install line
├── EncoderError             the asked vision encoder can't run here
└── HubError                 the Hugging Face hub can't be reached or hasn't got it

Each message says what was expected, what was found and what to do next. Command line tools print it
on one line and exit with `exit_code`: 2 for what the caller can mend, 1 for what failed around him.
"""

from __future__ import annotations


class FastVLMError(Exception):
    """Root of all errors of this library."""

    exit_code = 2


class InputError(FastVLMError):
    """An argument or a file given by the caller can't be used."""


class ImageError(InputError):
    """The image is missing, unreadable, no image at all, or too large."""


class PromptError(InputError):
    """The prompt doesn't fit the images or the tokenizer."""


class ResolutionError(InputError):
    """The resolution isn't one that the vision encoder accepts."""


class ContextLengthError(InputError):
    """The prompt is longer than the model's context."""


class ConfigError(FastVLMError):
    """A configuration has unknown, missing or impossible values."""


class WeightsError(FastVLMError):
    """Tensors are missing, unexpected, or have another shape than the config says."""


class BundleError(FastVLMError):
    """The folder isn't a usable bundle."""


class CheckpointError(FastVLMError):
    """The source checkpoint can't be read."""


class DiskSpaceError(FastVLMError):
    """The output doesn't fit on the disk."""


class MissingDependencyError(FastVLMError):
    """An optional dependency is needed for what was asked."""


class EncoderError(FastVLMError):
    """The vision encoder that was asked for can't run."""

    exit_code = 1


class VerificationError(FastVLMError):
    """A Core ML package doesn't compute what it should."""

    exit_code = 1


class HubError(FastVLMError):
    """The hub can't be reached, or hasn't got what was asked."""

    exit_code = 1
