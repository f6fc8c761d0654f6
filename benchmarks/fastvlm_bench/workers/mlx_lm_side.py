"""mlx-lm as a side of a comparison: the decoder alone."""

from __future__ import annotations

from typing import Any

from fastvlm_bench.machine import loaded_openblas
from fastvlm_bench.workers.serve import Emit, Setup, Side, serve


class MlxLmSide(Side):
    """`load` and `stream_generate`; the model's dtype is that of its files."""

    def __init__(self, setup: Setup) -> None:
        from mlx_lm import load

        self.model, self.tokenizer = load(setup.model)[:2]
        self.tokenizer.eos_token_ids = set()

    def facts(self) -> dict[str, Any]:
        import mlx.core as mx

        return {"device": f"MLX ({mx.default_device().type.name})", "openblas": loaded_openblas()}

    def complete(self, ids: list[int], tokens: int, emit: Emit) -> None:
        from mlx_lm import stream_generate

        for piece in stream_generate(self.model, self.tokenizer, ids, max_tokens=tokens):
            emit(int(piece.token))

    def settle(self) -> None:
        import mlx.core as mx
        from mlx_lm.generate import generation_stream

        mx.synchronize(generation_stream)
        mx.synchronize()


if __name__ == "__main__":
    serve(MlxLmSide)
