"""The plan of a scene, before anything is drawn: what is where."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nano.backdrops import Backdrop, plan_backdrop
from nano.charts import Chart, plan_chart
from nano.dice import Dice
from nano.lettering import Lettering, letters_of, plan_lettering
from nano.pages import NO_PAGE, Page, plan_page
from nano.paint import visible
from nano.shapes import TRAIN_PAIRS, Thing, place, plan_things
from nano.vocabulary import (
    FAMILIES,
    HELD_OUT_FONTS,
    HELD_OUT_PAIRS,
    HELD_OUT_PHOTOGRAPHS,
    HELD_OUT_WORDS,
    NINTHS,
    PAGE,
    held_out_number,
)

SHARES = (0.5, 0.35, 0.15)  # of FAMILIES
PHOTOGRAPHS, DRILLED_PHOTOGRAPHS = 0.25, 0.5  # of the scenes without a chart have one behind, and of those in training
NEW = 0.75  # of the held-out scenes have something that training never shows
# What can be new in a family, and how likely each is in a scene that has something new.
TRAITS = {
    "shapes": {"pair": 0.75, "photograph": 0.4},
    "text": {"font": 0.55, "word": 0.55, "photograph": 0.25},
    "chart": {"font": 1.0},
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is in a picture.

    Attributes:
        family: one of FAMILIES, or PAGE.
        backdrop: the background.
        things: shapes.
        lettering: the sign of a "text" scene.
        chart: the chart of a "chart" scene.
        page: lines and words of a page.
    """

    family: str
    backdrop: Backdrop
    things: tuple[Thing, ...] = ()
    lettering: Lettering | None = None
    chart: Chart | None = None
    page: Page = NO_PAGE

    @property
    def letterings(self) -> tuple[Lettering, ...]:
        """All text in it."""
        return (self.lettering,) if self.lettering else self.chart.labels if self.chart else self.page.words

    @property
    def novelties(self) -> frozenset[str]:
        """What of it training never shows: "pair", "photograph", "font", "word"."""
        found = {
            "pair": any(thing.pair in HELD_OUT_PAIRS for thing in self.things),
            "photograph": self.backdrop.photograph in HELD_OUT_PHOTOGRAPHS,
            "font": any(text.font in HELD_OUT_FONTS for text in self.letterings),
            "word": self.lettering is not None and _new_text(self.lettering),
        }
        return frozenset(name for name, new in found.items() if new)


def _new_text(lettering: Lettering) -> bool:
    if lettering.is_number:
        return held_out_number(int(lettering.text))
    return lettering.text.lower() in HELD_OUT_WORDS


def plan_scene(dice: Dice, held_out: bool, family: str | None = None) -> Plan:
    """Choose what is in a picture.

    Args:
        dice: the scene's.
        held_out: for the held-out split.
        family: one of FAMILIES, or for training PAGE; chosen by SHARES if None.
    """
    family = dice.weighted(FAMILIES, SHARES) if family is None else family
    new: set[str] = set()
    if held_out and dice.chance(NEW):
        traits = TRAITS[family]
        new = {trait for trait, likely in traits.items() if dice.chance(likely)} or {dice.pick(tuple(traits))}
    usual = PHOTOGRAPHS if held_out else DRILLED_PHOTOGRAPHS
    photographs = 0.0 if family == "chart" else 1.0 if "photograph" in new else usual
    backdrop = plan_backdrop(dice, photographs, "photograph" in new, varied=not held_out)
    if family == PAGE:
        return Plan(family, backdrop, page=plan_page(dice, backdrop))
    if family == "shapes":
        return Plan(family, backdrop, plan_things(dice, backdrop, "pair" in new))
    if family == "chart":
        return Plan(family, backdrop, chart=plan_chart(dice, backdrop, "font" in new))
    beside = dice.chance(0.4)
    lettering = _roomy(plan_lettering(dice, backdrop, "word" in new, "font" in new, beside, invents=not held_out))
    things = _beside(dice, backdrop, lettering) if beside else ()
    return Plan(family, backdrop, things, lettering)


def _roomy(lettering: Lettering) -> Lettering:
    """Enlarge text of which more characters share a cell than the targets have room for."""
    while (letters_of((lettering,)) > 0).sum() < len(lettering.text):
        lettering = replace(lettering, size=lettering.size * 1.1)
    return lettering


def _beside(dice: Dice, backdrop: Backdrop, lettering: Lettering) -> tuple[Thing, ...]:
    """A shape where the text leaves room for one."""
    pair = dice.pick(sorted(pair for pair in TRAIN_PAIRS if pair[1] in visible(backdrop)))
    width, height = lettering.extent
    for ninth in dice.shuffled(range(len(NINTHS))):
        thing = place(dice, pair, ninth, backdrop, dice.between(0.07, 0.12))
        reach = thing.radius + 0.015
        if abs(thing.x - lettering.x) > width / 2 + reach or abs(thing.y - lettering.y) > height / 2 + reach:
            return (thing,)
    return ()
