"""Our side of the comparisons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fastvlm_convert.schema import Shapes, decoder_shapes, projector_shapes, vision_shapes
from fastvlm_mlx import FastVLM
from fastvlm_mlx.config import DecoderConfig, ProjectorConfig, VisionConfig
from fastvlm_mlx.prefill import embed, prefill
from fastvlm_mlx.prompt import expand
from support.layouts import FASTVITHD
from support.seeded import GoldenPrompt

SIDE = 256  # the tiny shape's image size; arrays of it pass the preprocessing unchanged
GREEDY = 24  # ids in the golden files
# float32 on both sides, sums in another order. Measured: 0.7e-6 to 1.0e-6 for features and embeddings, 0.2e-6
# to 2.9e-6 for logits. For comparison: RMSNorm's epsilon 1e-5 for 1e-6 gives 3.5e-5 and more, tanh GELU 8e-4.
FEATURE_TOLERANCE = 5e-6
LOGIT_TOLERANCE = 1e-5
# Qwen2-0.5B, the decoder of apple/FastVLM-0.5B; its checkpoint has a head beside the embedding.
QWEN2_05B = DecoderConfig(896, 4864, 24, 14, 2, 151936, tie_word_embeddings=False)


def first_logits(model: FastVLM, prompt: GoldenPrompt) -> np.ndarray:
    embeddings = [model.encode_image(image, resolution=SIDE).embeddings for image in prompt.images]
    spans = expand(prompt.ids, [len(e) for e in embeddings], model.config.decoder.vocab_size)
    logits = prefill(model.decoder, embed(model.decoder, spans, embeddings), model.decoder.new_cache())
    return np.array(logits[0])


def greedy_ids(model: FastVLM, prompt: GoldenPrompt) -> list[int]:
    # No end of sequence, as in the golden files, so that every step has something to compare.
    answer = model.generate(prompt.images, prompt.ids, resolution=SIDE, max_tokens=GREEDY, ignore_eos=True)
    return list(answer.token_ids)


def unit_pixels(images: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1], which is all of the peers' normalisation."""
    return np.stack(images).transpose(0, 3, 1, 2).astype(np.float32) / 255


def published_shapes() -> Shapes:
    """LLaVA name -> shape of every tensor that the converter wants from apple/FastVLM-0.5B."""
    vision = VisionConfig(1024, tuple(FASTVITHD["layers"]), tuple(FASTVITHD["embed_dims"]))
    projector = ProjectorConfig(vision.feature_dim, QWEN2_05B.hidden_size)
    return vision_shapes(vision) | projector_shapes(projector, newline=False) | decoder_shapes(QWEN2_05B)
