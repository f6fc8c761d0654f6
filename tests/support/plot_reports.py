"""Whole reports of `fastvlm-bench`, format_version 2, for its figures; made up by hand."""

from __future__ import annotations

from typing import Any

from support.reports import MACHINE, report, spread, subject

STAGES = ("preprocess", "tokenize", "vision", "projector", "prefill", "first_token")
PEAKS = {"matmul_flops": {"float32": 2e12, "float16": 4e12}, "bandwidth": 1e11}
OTHER = MACHINE | {"cpu": "Apple M1", "device": "gpu: Apple M1", "memory_bytes": 8 * 2**30}


def model(name: str = "FastVLM-0.5B", bits: int | None = None, vision: str = "mlx", **more: Any) -> dict[str, Any]:
    width = f", {bits} bits" if bits else ""
    return subject(None, bits, name=name, vision=vision, label=f"{name}{width}, vision {vision}", **more)


def case(
    index: int,
    side: int,
    stages: tuple[float, ...] = (10.0, 0.1, 60.0, 1.0, 30.0, 2.0),
    ttft: tuple[float, float, float] | None = None,
    second: float = 8.0,
    text_tokens: int = 24,
    roofline: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A summary entry; `stages` in the order of STAGES, `ttft` as median, low, high; all milliseconds."""
    median, low, high = ttft or (sum(stages), 0.9 * sum(stages), 1.2 * sum(stages))
    figures = {f"{stage}_ms": spread(value) for stage, value in zip(STAGES, stages, strict=True)}
    figures |= {"ttft_ms": {"median": median, "low": low, "high": high}, "second_ttft_ms": spread(second)}
    tokens = (side // 64) ** 2
    return {
        "subject": index,
        "resolution": side,
        "image_tokens": tokens,
        "prompt_tokens": tokens + text_tokens,
        "runs": 5,
        "figures": figures,
        "roofline": roofline,
        "peak_bytes": 10**9,
    }


def limit(flops: float, moved: float, measured_ms: float, rate: float = 4e12) -> dict[str, Any]:
    """A stage of a roofline, with the machine of PEAKS."""
    compute, memory = flops / rate * 1e3, moved / PEAKS["bandwidth"] * 1e3
    least = max(compute, memory)
    bound = "compute" if compute >= memory else "memory"
    return {"flops": flops, "bytes": moved, "bound": bound, "limit_ms": least, "share": least / measured_ms}


def whole(subjects: list[dict[str, Any]], cases: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    sides = sorted({entry["resolution"] for entry in cases})
    tokens = cases[0]["prompt_tokens"] - cases[0]["image_tokens"]
    plan = {"resolutions": sides, "runs": 5, "warmup": 1, "prompt_tokens": tokens, "max_tokens": 32}
    return report(subjects, cases, **({"plan": plan, "image": "synthetic photo, 1280 x 960 px JPEG"} | more))


def decoders(count: int = 3, sides: tuple[int, ...] = (256, 512, 768, 1024), **more: Any) -> dict[str, Any]:
    """Decoders of growing size at several resolutions, with rooflines; the axes of the paper's Figures 4 and 5."""
    cases = []
    for index in range(count):
        for side in sides:
            pixels, weights = (side / 1024) ** 2, 5e8 * 3**index
            tokens = (side // 64) ** 2 + 24
            vision, prefill = 6 + 110 * pixels, weights * tokens * 1e-9 + 3
            roofline = {
                "vision": limit(660e9 * pixels, 250e6 + 900e6 * pixels, vision * 2.5),
                "projector": limit(5.5e6 * tokens, 20e6, 0.5),
                "prefill": limit(2 * weights * tokens, 2 * weights + 2e6 * tokens, prefill * 1.5),
                "decode": limit(2 * weights, 2 * weights, weights * 3e-8),
            }
            stages = (9 + 3 * pixels, 0.05, vision, 0.4 + 0.4 * pixels, prefill, 1.5)
            cases.append(case(index, side, stages, second=0.3 * prefill + 8, roofline=roofline))
    sizes = ("0.5B", "1.5B", "7B", "13B", "34B", "70B", "72B", "90B")
    return whole([model(f"FastVLM-{sizes[i]}") for i in range(count)], cases, **({"peaks": PEAKS} | more))


LONG = "acme-research/FastVLM-Instruct-Extended-Vocabulary-Finetuned-On-Documents-2026-10-stage3-checkpoint-12000"


def hard_ones() -> dict[str, list[dict[str, Any]]]:
    """Reports, together in one figure, in which labels might collide or be cut off."""
    long = decoders(2, (256, 1024), machine=MACHINE | {"cpu": "A Processor with a Very Long Marketing Name " * 3})
    long["subjects"] = [model(LONG), model(f"{LONG}, and more, and still more, and yet more of it, without an end")]
    many = decoders(8)
    many["subjects"] = [model("FastVLM-0.5B", bits, v) for bits in (None, 3, 4, 8) for v in ("mlx", "coreml")]
    tiny = (0.4, 0.04, 1.1, 0.1, 0.5, 0.1)
    wide = [
        case(0, 64, tiny),
        case(0, 256, tiny),
        case(1, 512, (40, 0.1, 9e3, 20, 14e3, 200)),
        case(1, 2048, (9e3,) * 6),
    ]
    one = whole([model()], [case(0, 1024)])
    early = whole([model("a"), model("b")], [case(0, side) for side in (256, 512, 1024)] + [case(1, 256)])
    close = whole([model("a"), model("b")], [case(i, side) for i in (0, 1) for side in (64, 128, 1920, 1984, 2048)])
    return {
        "three decoders at four resolutions": [decoders()],
        "long names": [long],
        "eight models": [many],
        "from 2 ms to a minute": [whole([model("tiny"), model("huge")], wide)],
        "one model at one resolution": [one],
        "a model that was measured at one resolution only": [early],
        "resolutions close to each other": [close],
        "two machines": [decoders(2), decoders(2, machine=OTHER)],
    }
