"""Reports of `fastvlm-bench`, format_version 2, made up by hand."""

from __future__ import annotations

from typing import Any

MACHINE = {
    "platform": "macOS-15-arm64",
    "cpu": "Apple M2",
    "cores": 8,
    "memory_bytes": 16 * 2**30,
    "device": "gpu: Apple M2",
    "python": "3.12.0",
    "mlx": "0.32.4",
    "openblas": None,
}


def subject(size: str | None = "0.5b", bits: int | None = None, **more: Any) -> dict[str, Any]:
    data = {
        "name": f"FastVLM-{size.upper()}" if size else "mine",
        "size": size,
        "seeded": False,
        "bits": bits,
        "precision": f"{bits} bits, bfloat16 scales" if bits else "bfloat16",
        "vision": "mlx",
        "device": "vision: MLX (gpu), decoder: MLX (gpu)",
        "weights_bytes": 1_000_000,
        "load": {"cold_ms": None, "warm_ms": [10.0]},
    }
    return data | more


def spread(median: float, width: float = 0.0) -> dict[str, float]:
    return {"median": median, "low": median - width, "high": median + width}


def point(
    index: int,
    side: int,
    vision: float,
    prefill: float,
    rest: float = 0.0,
    width: float = 0.0,
    text_tokens: int = 24,
    peak_bytes: int | None = 10**9,
) -> dict[str, Any]:
    """A summary entry with `peak_bytes` for its runs; `width` is how far the ends of every figure lie apart."""
    tokens = (side // 64) ** 2
    figures = {
        "ttft_ms": spread(vision + prefill + rest, width),
        "vision_ms": spread(vision),
        "prefill_ms": spread(prefill),
    }
    return {
        "subject": index,
        "resolution": side,
        "image_tokens": tokens,
        "prompt_tokens": tokens + text_tokens,
        "runs": 10,
        "figures": figures,
        "roofline": None,
        "peak_bytes": peak_bytes,
    }


def report(subjects: list[dict[str, Any]], points: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The data of the JSON; each point has three runs, of which the second one took its peak of memory."""
    runs = [
        {
            "subject": p["subject"],
            "resolution": p["resolution"],
            "peak_bytes": None if p["peak_bytes"] is None else p["peak_bytes"] - less,
        }
        for p in points
        for less in (1000, 0, 500)
    ]
    data = {
        "format_version": 2,
        "tool": "fastvlm-bench 0.1",
        "date": "2026-11-21T10:00:00+00:00",
        "image": "synthetic photo, 1280 x 960 px JPEG",
        "machine": dict(MACHINE),
        "plan": {"resolutions": [], "runs": 10, "warmup": 1, "prompt_tokens": 24, "max_tokens": 1},
        "subjects": subjects,
        "peaks": None,
        "runs": runs,
        "summary": [{k: v for k, v in p.items() if k != "peak_bytes"} for p in points],
    }
    return data | more
