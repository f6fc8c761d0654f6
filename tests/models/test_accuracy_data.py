"""Published accuracies: the figures as they stand on the pages, with their source."""

from __future__ import annotations

from datetime import date

from fastvlm_zoo import entries
from fastvlm_zoo.accuracy import elsewhere, published

# Benchmark: 0.5B, 1.5B, 7B, as on the model cards.
CARDS = {
    "TextVQA": (64.5, 70.4, 74.9),
    "DocVQA": (82.5, 88.3, 93.2),
    "ChartQA": (76.0, 80.1, 85.0),
    "MMMU": (33.9, 37.8, 45.4),
    "OCRBench": (63.9, 70.2, 73.1),
    "SeedBench-Img": (71.0, 74.2, 75.4),
}


def test_the_published_models():
    assert [entry.size for entry in published()] == ["0.5b", "1.5b", "7b"], "smallest first"
    for index, entry in enumerate(published()):
        assert entry.scores == {name: scores[index] for name, scores in CARDS.items()}
        assert entry.resolution == 1024
        assert entry.source.url == f"https://huggingface.co/apple/{entry.model}"
        assert entry.source.url.removeprefix("https://huggingface.co/") in {known.repo for known in entries()}
        assert entry.model in entry.source.title
        assert isinstance(entry.source.read, date)


def test_other_set_ups_are_nobodys_here():
    (paper,) = elsewhere()
    assert (paper.size, paper.resolution) == (None, 256)
    assert paper.scores == {"GQA": 60.6, "TextVQA": 53.1, "POPE": 82.3}
    assert "Vicuna-7B" in paper.model
    assert paper.source.url == "https://arxiv.org/abs/2412.13303"


def test_a_page_that_was_not_read_has_no_day():
    (paper,) = elsewhere()
    assert paper.source.read is None
    assert paper.source.title.endswith("as quoted in public summaries of the paper")
    assert str(paper.source).endswith("https://arxiv.org/abs/2412.13303")
    assert str(published()[0].source).endswith("apple/FastVLM-0.5B, read 2026-11-21")
