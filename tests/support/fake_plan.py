"""A stand-in for coremltools' MLComputePlan, which only a Mac can make."""

from __future__ import annotations

import platform
import sys
from contextlib import contextmanager
from types import SimpleNamespace

# Whether this is a Mac that makes plans itself
HAS_PLANS = sys.platform == "darwin" and tuple(map(int, platform.mac_ver()[0].split(".")[:2])) >= (14, 4)


class MLNeuralEngineComputeDevice: ...


class MLGPUComputeDevice: ...


class MLCPUComputeDevice: ...


NE, GPU, CPU = MLNeuralEngineComputeDevice, MLGPUComputeDevice, MLCPUComputeDevice


def op(name, kind, device=None, weight=None):
    """One of a plan's ops; without a device or a weight Core ML says nothing of it."""
    usage = device and SimpleNamespace(preferred_compute_device=device(), supported_compute_devices=[NE(), CPU()])
    cost = None if weight is None else SimpleNamespace(weight=weight)
    return SimpleNamespace(operator_name=kind, outputs=[SimpleNamespace(name=name)], blocks=[], usage=usage, cost=cost)


def plan(**functions):
    program = SimpleNamespace(
        functions={n: SimpleNamespace(block=SimpleNamespace(operations=ops)) for n, ops in functions.items()}
    )
    return SimpleNamespace(
        model_structure=SimpleNamespace(program=program),
        get_compute_device_usage_for_mlprogram_operation=lambda operation: operation.usage,
        get_estimated_cost_for_mlprogram_operation=lambda operation: operation.cost,
    )


# Half of the whole package's cost, as if another function had the rest.
R8 = [
    op("w", "const"),
    op("w8", "ios18.constexpr_blockwise_shift_scale"),
    op("in", "ios18.cast", CPU, 0.05),
    op("y", "ios18.conv", NE, 0.3),
    op("z", "ios18.gelu", NE, 0.05),
    op("s", "ios18.softmax", GPU, 0.1),
    op("odd", "ios18.reshape"),
]
R16 = [op("y", "ios18.conv", NE, 0.5)]


def opener_of(found, seen=None):
    @contextmanager
    def opener(package, compute_units):
        if seen is not None:
            seen.append((package, compute_units))
        yield found

    return opener
