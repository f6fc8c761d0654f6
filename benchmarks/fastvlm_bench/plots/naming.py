"""What the models of a figure are called, as short as tells them apart, and the heading that says the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from fastvlm_bench.plots.series import Series

_LISTED = 4  # models that a heading names; more are counted


def short_names(series: Sequence[Series]) -> list[str]:
    """A name for each series, in order, all different.

    The model, less what all of them share, and whatever else isn't the same for all of them: the machine, the length
    of the question. Where that isn't enough, how and when they were measured.
    """
    shared = set(shared_parts(series))
    names = [", ".join(part for part in _parts(one) if part not in shared) for one in series]
    machines = [one.machine for one in series]
    differing = [place for place, parts in enumerate(zip(*machines, strict=True)) if len(set(parts)) > 1]
    if differing:  # the processor tells most; the rest only where it's needed
        shown = sorted({0, *differing}) if len({m[0] for m in machines}) < len(set(machines)) else [0]
        names = [f"{name}, {', '.join(m[place] for place in shown)}" for name, m in zip(names, machines, strict=True)]
    if len({one.text_tokens for one in series}) > 1:
        names = [f"{name}, {one.text_tokens} text tokens" for name, one in zip(names, series, strict=True)]
    for fact in _FACTS:
        names = _told_apart(names, [fact(one) for one in series])
    return _told_apart(names, [f"no. {number}" for number in range(1, len(series) + 1)])


def shared_parts(series: Sequence[Series]) -> list[str]:
    """What the labels of several models have in common, such as "vision mlx"; their first part, the name, isn't."""
    if len(series) < 2:
        return []
    first, *others = (_parts(one)[1:] for one in series)
    return [part for part in first if all(part in other for other in others)]


def heading(series: Sequence[Series]) -> list[str]:
    """Two lines: the models; where and when."""
    shared = shared_parts(series)
    names = list(dict.fromkeys(", ".join(part for part in _parts(one) if part not in shared) for one in series))
    if len(series) == 1:
        names.append(f"decoder {series[0].precision}")
    kinds = list(dict.fromkeys(_parts(one)[0] for one in series))
    of = f" of {len(kinds)} kinds" if len(kinds) > _LISTED else f": {', '.join(kinds)}"
    listed = names if len(names) <= _LISTED else [f"{len(names)} models{of}"]
    seeded = ["random weights"] if all(one.seeded for one in series) else []
    machines = list(dict.fromkeys(", ".join((*one.machine[:-1], f"MLX {one.mlx} {one.machine[-1]}")) for one in series))
    return ["; ".join((*listed, *shared, *seeded)), "; ".join((*machines, _dates(series)))]


def footnote(series: Sequence[Series]) -> str:
    """How often, and about what."""
    runs = sorted({one.runs for one in series})
    times = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    tokens = " or ".join(str(count) for count in sorted({one.text_tokens for one in series}))
    return (
        f"Medians of {times} run{'' if runs == [1] else 's'}; {' or '.join(dict.fromkeys(s.image for s in series))}; "
        f"{tokens} text tokens"
    )


def _dates(series: Sequence[Series]) -> str:
    days = sorted({_day(one) for one in series})
    return days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"


def _day(one: Series) -> str:
    return one.date.partition("T")[0]


_FACTS: tuple[Callable[[Series], str], ...] = (
    lambda one: one.precision,
    lambda one: one.device,
    lambda one: f"MLX {one.mlx}",
    _day,
    lambda one: one.date,
    lambda one: one.source,
)


def _parts(one: Series) -> list[str]:
    return one.label.split(", ")


def _told_apart(names: Sequence[str], facts: Sequence[str]) -> list[str]:
    """Names that appear more than once get a fact, if it isn't the same for all who have the name."""
    counts = Counter(names)
    facts_of = {name: {fact for other, fact in zip(names, facts, strict=True) if other == name} for name in counts}
    return [
        f"{name}, {fact}" if counts[name] > 1 and len(facts_of[name]) > 1 else name
        for name, fact in zip(names, facts, strict=True)
    ]
