"""transformers as a side of a comparison: FastVlmForConditionalGeneration in PyTorch, on the CPU."""

from __future__ import annotations

from typing import Any

from fastvlm_bench.workers.serve import Emit, Setup, Side, serve
from fastvlm_bench.workers.torchvision_operators import declare_torchvision_operators


class TransformersSide(Side):
    """`AutoProcessor.apply_chat_template` and `generate` with a streamer, as its documentation shows."""

    def __init__(self, setup: Setup) -> None:
        declare_torchvision_operators()
        import torch
        from transformers import AutoProcessor, FastVlmForConditionalGeneration

        torch.set_num_threads(setup.threads)
        self.dtype = getattr(torch, setup.dtype)
        self.model = FastVlmForConditionalGeneration.from_pretrained(setup.model, dtype=self.dtype).eval()
        # Pillow decodes and resizes here as everywhere else; torchvision's own rounds differently.
        self.processor = AutoProcessor.from_pretrained(setup.model, backend="pil")

    def facts(self) -> dict[str, Any]:
        import torch

        images = type(self.processor.image_processor).__name__
        return {"device": f"PyTorch (cpu), {torch.get_num_threads()} threads", "images": images}

    def ask(self, image: str, question: str, resolution: int, tokens: int, emit: Emit) -> int | None:
        from transformers import GenerationConfig

        images = self.processor.image_processor  # as preprocessor_config.json would set it
        images.size, images.crop_size = {"shortest_edge": resolution}, {"height": resolution, "width": resolution}
        content = [{"type": "image", "path": image}, {"type": "text", "text": question}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, self.dtype)
        greedy = GenerationConfig(do_sample=False, max_new_tokens=tokens, eos_token_id=None, pad_token_id=0)
        self.model.generate(**inputs, generation_config=greedy, streamer=_Streamer(emit))
        return int(inputs["input_ids"].shape[1])


class _Streamer:
    """Passes generated ids on; what `generate` puts first is the prompt."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self._prompt = True

    def put(self, value: Any) -> None:
        if not self._prompt:
            self._emit(int(value))
        self._prompt = False

    def end(self) -> None:
        pass


if __name__ == "__main__":
    serve(TransformersSide)
