"""What this machine reaches at best, measured: matrix multiplication and memory.

Two seconds on MLX's default device. A peak is a maximum: of several repeats the fastest counts, and of several sizes
and ways the one that does best. It is what MLX reaches here, not what the maker's data sheet says.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt

from fastvlm_bench.layers import VALUE_BYTES, Storage
from fastvlm_mlx.errors import InputError

SECONDS = 2.0
PLAIN = tuple(Storage(dtype) for dtype in VALUE_BYTES)
_SIDES = tuple(128 << doubled for doubled in range(8))  # to 16384: smaller ones leave a data centre's GPU idle
_PASSES = tuple(1 << doubled for doubled in range(7))  # over the memory, queued: the start of one is 50-200 us
_MEMORY_BYTES = 256 << 20  # read, and written in place: several times the caches of most machines
_REPEATS = 3

Clock = Callable[[], float]
Job = tuple[Callable[[], object], float]  # what to run to its end, and how much work it is


@dataclass(frozen=True, slots=True)
class Peaks:
    """The greatest rates.

    Attributes:
        matmul_flops: floating-point operations per second (a multiply-accumulate is two) by `Storage.name`: of
            square plain matrices by "float32", ..., of a quantised right-hand side by "4 bits, bfloat16", ...
        bandwidth: bytes per second, read and written ones counted alike.
    """

    matmul_flops: dict[str, float]
    bandwidth: float

    def rate(self, storage: Storage) -> float:
        """Operations per second for a part that is kept so.

        For quantised matrices that is the better of their own rate and the plain ones' of the same dtype, as far as
        they were measured: they could be unpacked first.

        Raises:
            InputError: neither was measured.
        """
        rates = [self.matmul_flops[name] for name in (storage.dtype, storage.name) if name in self.matmul_flops]
        if not rates:
            raise InputError(
                f"the peaks must have the matmul rate of {storage.dtype}, they have "
                f"{'; '.join(self.matmul_flops) or 'none'}; measure it too: measure_peaks([Storage({storage.dtype!r})])"
            )
        return max(rates)


def measure_peaks(
    kinds: Iterable[Storage] = PLAIN,
    seconds: float = SECONDS,
    memory_bytes: int = _MEMORY_BYTES,
    clock: Clock = time.perf_counter,
) -> Peaks:
    """Measure this machine; imports MLX, before which `fastvlm_mlx.accelerate.prepare_cpu` must have been called.

    Args:
        kinds: whose matmul rates are wanted; quantised ones too.
        seconds: for everything, about. What is slow, such as the 16-bit types on a CPU, gets smaller matrices and no
            more time.
        memory_bytes: of the array that is streamed through, float32; several times the largest cache.
        clock: seconds.
    """
    import mlx.core as mx

    kinds = tuple(dict.fromkeys(kinds))
    budget = seconds / (len(kinds) + 2)
    rates = {kind.name: best_rate(partial(_matmul, kind), _SIDES, 8, budget, clock) for kind in kinds}
    bandwidth = max(best_rate(way(memory_bytes), _PASSES, 2, budget, clock) for way in (_in_place, _reading))
    mx.clear_cache()
    return Peaks(rates, bandwidth)


def best_rate(job: Callable[[int], Job], sizes: Sequence[int], growth: float, budget: float, clock: Clock) -> float:
    """Greatest work per second of any size that the time allows.

    Args:
        job: a size's, made ready.
        sizes: from the least, which always runs.
        growth: how many times as long as one size the next takes.
        budget: seconds, warm-up not counted; what larger sizes leave is spent on more repeats.
        clock: seconds.
    """
    best, spent = 0.0, 0.0
    for size in sizes:
        run, work = job(size)
        run()  # makes kernels, touches memory
        times = [_seconds(run, clock) for _ in range(_REPEATS)]
        spent += sum(times)
        last = size == sizes[-1] or spent + growth * _REPEATS * min(times) > budget
        while last and spent + min(times) <= budget:
            times.append(_seconds(run, clock))
            spent += times[-1]
        best = max(best, work / min(times))
        if last:
            break
    return best


def _seconds(run: Callable[[], object], clock: Clock) -> float:
    start = clock()
    run()
    return clock() - start


def _matmul(kind: Storage, side: int) -> Job:
    """A product of two square matrices."""
    import mlx.core as mx

    dtype: mx.Dtype = getattr(mx, kind.dtype)
    # Not zeros: with those a GPU draws less power and clocks higher than it could with a model's values.
    left, right = (mx.random.uniform(shape=(side, side), dtype=dtype, key=mx.random.key(n)) for n in range(2))
    if kind.bits is None:
        mx.eval(left, right)
        return lambda: mx.eval(left @ right), 2 * side**3
    packed, scales, biases = mx.quantize(right, kind.group_size, kind.bits)
    mx.eval(left, packed, scales, biases)
    multiply = partial(mx.quantized_matmul, group_size=kind.group_size, bits=kind.bits)
    return lambda: mx.eval(multiply(left, packed, scales, biases)), 2 * side**3


def _in_place(memory_bytes: int) -> Callable[[int], Job]:
    """Add 1 to an array: reads all and writes all.

    In place: a CPU reads memory before it overwrites it, which for a second array would be traffic that nobody counts.
    """
    import mlx.core as mx

    held = [mx.ones(memory_bytes // 4)]

    def job(passes: int) -> Job:
        def run() -> None:
            array = held.pop()  # MLX reuses the memory of what nobody else holds
            for _ in range(passes):
                array = array + 1
            mx.eval(array)
            held.append(array)

        return run, 2 * memory_bytes * passes

    return job


def _reading(memory_bytes: int) -> Callable[[int], Job]:
    """A matrix times a vector: reads all, as a decoder does for each token; on a CPU with as many threads."""
    import mlx.core as mx

    columns = isqrt(memory_bytes // 4)
    rows = memory_bytes // 4 // columns
    matrix = mx.full((rows, columns), 2 / columns)  # a vector of equal values becomes twice itself
    mx.eval(matrix)

    def job(passes: int) -> Job:
        def run() -> None:
            vector = mx.ones((columns, 1))
            for _ in range(passes):  # one after the other: two at once would share what they read
                vector = (matrix @ vector)[:columns]
            mx.eval(vector)

        return run, 4 * rows * columns * passes

    return job
