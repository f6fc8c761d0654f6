"""fastvlm-mlx as a side of a comparison."""

from __future__ import annotations

from typing import Any

from fastvlm_bench.machine import loaded_openblas
from fastvlm_bench.workers.serve import Emit, Setup, Side, serve


class OurSide(Side):
    """As `fastvlm_mlx.load` makes it, FastViTHD in MLX."""

    def __init__(self, setup: Setup) -> None:
        from fastvlm_mlx import load

        self.model = load(setup.model, vision="mlx", dtype=setup.dtype, vision_dtype=setup.dtype)

    def facts(self) -> dict[str, Any]:
        return {"device": self.model.device, "openblas": loaded_openblas()}

    def ask(self, image: str, question: str, resolution: int, tokens: int, emit: Emit) -> int | None:
        positions = None
        for piece in self.model.stream(image, question, resolution=resolution, max_tokens=tokens, ignore_eos=True):
            if piece.token_id is not None:
                emit(piece.token_id)
            if piece.result:
                positions = piece.result.prompt_tokens
        return positions

    def complete(self, ids: list[int], tokens: int, emit: Emit) -> None:
        for piece in self.model.stream(None, ids, max_tokens=tokens, ignore_eos=True):
            if piece.token_id is not None:
                emit(piece.token_id)

    def forget(self) -> None:
        self.model.engine.forget()

    def settle(self) -> None:
        import mlx.core as mx

        mx.synchronize()


if __name__ == "__main__":
    serve(OurSide)
