"""mlx-vlm as a side of a comparison, through the functions that its README shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastvlm_bench.machine import loaded_openblas
from fastvlm_bench.workers.serve import Emit, Setup, Side, serve
from fastvlm_bench.workers.torchvision_operators import declare_torchvision_operators


class MlxVlmSide(Side):
    """`load`, `apply_chat_template` and `stream_generate`; the model's dtype is that of its files."""

    def __init__(self, setup: Setup) -> None:
        declare_torchvision_operators()
        from mlx_vlm import load
        from mlx_vlm.models.fastvlm.config import VisionConfig

        # Its config's `layers` and `embed_dims` are class attributes and no fields: what config.json says of
        # them is ignored, and only the published shape could be had.
        shape = json.loads((Path(setup.model) / "config.json").read_text(encoding="utf-8"))["vision_config"]
        VisionConfig.layers, VisionConfig.embed_dims = shape["layers"], shape["embed_dims"]
        self.model, self.processor = load(setup.model)
        self.processor.tokenizer.stopping_criteria = lambda _: False

    def facts(self) -> dict[str, Any]:
        import mlx.core as mx

        return {"device": f"MLX ({mx.default_device().type.name})", "openblas": loaded_openblas()}

    def ask(self, image: str, question: str, resolution: int, tokens: int, emit: Emit) -> int | None:
        from mlx_vlm import apply_chat_template, stream_generate

        images = self.processor.image_processor  # as preprocessor_config.json would set it
        images.size, images.crop_size = {"shortest_edge": resolution}, {"height": resolution, "width": resolution}
        prompt = apply_chat_template(self.processor, self.model.config, question, num_images=1)
        pieces = stream_generate(self.model, self.processor, prompt, [image], max_tokens=tokens, temperature=0.0)
        for piece in pieces:
            if piece.finish_reason is None:  # the last one says how it ended and repeats the token before
                emit(int(piece.token))
        return None

    def settle(self) -> None:
        import mlx.core as mx
        from mlx_vlm.generate import generation_stream

        mx.synchronize(generation_stream)
        mx.synchronize()


if __name__ == "__main__":
    serve(MlxVlmSide)
