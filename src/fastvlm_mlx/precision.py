"""The types that projector and decoder are kept in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from fastvlm_mlx.projector import MLPProjector

_QUANTIZE_GROUP = 64


def make_ready(
    projector: MLPProjector, network: nn.Module, quantize: int | None, dtype: mx.Dtype | None, unpack: bool
) -> None:
    """Bring projector and decoder, in place, to the types that they are kept in; `unpack` replaces packed matrices."""
    import mlx.core as mx
    import mlx.nn as nn

    if quantize:
        nn.quantize(network, group_size=_QUANTIZE_GROUP, bits=quantize, class_predicate=_divides)
    for module in (projector, network):
        if dtype:
            module.set_dtype(dtype)
        if unpack:
            unpack_quantized(module)
        module.eval()
        # One after the other: a quantised 7B model needs no more memory than its largest matrix besides itself.
        for _, layer in module.named_modules():
            mx.eval([value for value in layer.values() if isinstance(value, mx.array)])


def _divides(_: str, layer: nn.Module) -> bool:
    return hasattr(layer, "to_quantized") and layer["weight"].shape[-1] % _QUANTIZE_GROUP == 0


def unpack_quantized(module: nn.Module) -> None:
    """Replace quantised layers by plain ones that hold the same values."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_unflatten

    plain: list[tuple[str, nn.Module]] = []
    for path, layer in module.named_modules():
        if not isinstance(layer, nn.QuantizedLinear | nn.QuantizedEmbedding):
            continue
        weight = mx.dequantize(
            layer.weight, layer.scales, layer["biases"], group_size=layer.group_size, bits=layer.bits
        )
        rows, columns = weight.shape
        new: nn.Module
        if isinstance(layer, nn.QuantizedEmbedding):
            new = nn.Embedding(rows, columns)
        else:
            new = nn.Linear(columns, rows, bias="bias" in layer)
        new.update({name: weight if name == "weight" else layer[name] for name in new.parameters()})
        plain.append((path, new))
    if plain:
        module.update_modules(tree_unflatten(plain))
