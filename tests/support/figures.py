"""What a drawn figure says."""

from __future__ import annotations

from fastvlm_bench.plots.series import read_series


def series_of(*reports):
    return read_series([(f"report {number}", data) for number, data in enumerate(reports)])


def texts(figure):
    """Every text that is drawn."""
    found = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    for axes in [*figure.axes, *(child for parent in figure.axes for child in parent.child_axes)]:
        found += axes.texts
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            shown = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found += [axis.label, *(label for tick in shown for label in (tick.label1, tick.label2))]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def words(figure):
    return [text.get_text() for text in texts(figure)]
