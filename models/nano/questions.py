"""All questions about a scene, and how often each is asked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from nano.charts import Bar, Chart
from nano.dice import Dice
from nano.lettering import Lettering, colour_name
from nano.phrases import Phrasebook, Question, listed, with_article
from nano.planning import Plan
from nano.shape_questions import ShapeAsker
from nano.vocabulary import COLOURS, NINTHS

FEWEST, MOST = 4, 8
LEAST_KINDS = 3
MOST_OF_A_KIND = 3  # in training, so that MOST of them are of LEAST_KINDS
SPARE = 0.3  # less likely questions never fill up a short list: they are rare to keep answers in balance
CLEAR = 0.1  # a text whose centre is this near to the centre of a ninth is there beyond doubt
Asker = Callable[[], Question | None]
# In training what is learnt soon is asked half as often, and what takes long in its place: of relations, counts and
# descriptions every step then has two to three times as many. The held-out split asks as it always did.
SOON = ("colour", "shape", "presence", "position")
LONG = (("relation", 0.9), ("relation", 0.7), ("count", 0.6), ("describe", 0.4), ("higher", 0.5), ("value", 0.5))


def describe(plan: Plan) -> str:
    """The sentence that describes a scene: things in reading order, then the background."""
    if plan.chart:
        names = [with_article(f"{bar.name} bar") for bar in plan.chart.bars]
        return f"A bar chart with {listed(names)} on {with_article(f'{plan.backdrop.name} background')}."
    ordered = sorted(plan.things, key=lambda thing: thing.ninth)
    names = [with_article(thing.name) for thing in ordered]
    if plan.lettering:
        what = "number" if plan.lettering.is_number else "word"
        sign = f" on {with_article(plan.lettering.plate_name)} sign" if plan.lettering.plate else ""
        names.insert(0, f'the {what} "{plan.lettering.text}"{sign}')
    ground = "a photograph" if plan.backdrop.photograph else with_article(f"{plan.backdrop.name} background")
    sentence = f"{listed(names)} on {ground}."
    return sentence[0].upper() + sentence[1:]


@dataclass(frozen=True, slots=True)
class SceneAsker:
    """Questions about the background, text and charts.

    Attributes:
        plan: the scene.
        dice: the scene's.
        book: puts questions into words.
    """

    plan: Plan
    dice: Dice
    book: Phrasebook

    def background(self) -> Question | None:
        """What colour the background is; not asked where that could mean a sign's plate."""
        backdrop, lettering = self.plan.backdrop, self.plan.lettering
        doubtful = backdrop.photograph or (lettering is not None and lettering.plate is not None)
        return None if doubtful else self.book.ask("colour", "background", backdrop.name)

    def describe(self) -> Question | None:
        """What the picture shows."""
        return self.book.ask("describe", "describe", describe(self.plan))

    def is_text(self) -> Question | None:
        """Whether there is any text; asked of signs as often as of shapes. Photographs may have some of their own."""
        if self.plan.backdrop.photograph:
            return None
        noun = self.dice.pick(("a word or number", "text", "any text", "some text"))
        return self.book.ask("presence", "presence", "yes" if self.plan.lettering else "no", a_thing=noun)


@dataclass(frozen=True, slots=True)
class TextAsker:
    """Questions about a sign."""

    lettering: Lettering
    dice: Dice
    book: Phrasebook

    def _noun(self) -> str:
        return self.dice.pick(("number" if self.lettering.is_number else "word", "text"))

    def read(self) -> Question | None:
        """What it says, not telling whether that is a word."""
        return self.book.ask("reading", "read", self.lettering.text)

    def read_word(self) -> Question | None:
        """What it says."""
        key = "read number" if self.lettering.is_number else "read word"
        return self.book.ask("reading", key, self.lettering.text)

    def colour(self) -> Question | None:
        """What colour the text has."""
        return self.book.ask("colour", "colour of text", colour_name(self.lettering), text=self._noun())

    def position(self) -> Question | None:
        """Where the text is, if its centre is near that of a ninth."""
        column, row = int(self.lettering.x * 3), int(self.lettering.y * 3)
        away = max(abs(self.lettering.x - (column + 0.5) / 3), abs(self.lettering.y - (row + 0.5) / 3))
        if away > CLEAR:
            return None
        return self.book.ask("position", "position", NINTHS[3 * row + column], x=f"the {self._noun()}")


@dataclass(frozen=True, slots=True)
class ChartAsker:
    """Questions about a chart."""

    chart: Chart
    dice: Dice
    book: Phrasebook

    def _two(self) -> tuple[Bar, Bar]:
        first, second = self.dice.shuffled(self.chart.bars)[:2]
        return first, second

    def highest(self) -> Question | None:
        """Which bar is the highest."""
        return self.book.ask("chart", "highest", max(self.chart.bars, key=lambda bar: bar.value).name)

    def lowest(self) -> Question | None:
        """Which bar is the lowest."""
        return self.book.ask("chart", "lowest", min(self.chart.bars, key=lambda bar: bar.value).name)

    def value(self) -> Question | None:
        """What one bar's value is."""
        bar = self.dice.pick(self.chart.bars)
        return self.book.ask("chart", "value", str(bar.value), x=f"the {bar.name} bar")

    def higher(self) -> Question | None:
        """Whether one bar is higher than another."""
        first, second = self._two()
        answer = "yes" if first.value > second.value else "no"
        return self.book.ask("chart", "higher", answer, x=f"the {first.name} bar", y=f"the {second.name} bar")

    def count(self) -> Question | None:
        """How many bars there are."""
        return self.book.ask("count", "count", str(len(self.chart.bars)), things="bars")

    def presence(self) -> Question | None:
        """Whether there is a bar of some colour."""
        there = [bar.name for bar in self.chart.bars]
        yes = self.dice.chance(0.5)
        name = self.dice.pick(there if yes else [colour for colour in COLOURS if colour not in there])
        return self.book.ask("presence", "presence", "yes" if yes else "no", a_thing=with_article(f"{name} bar"))

    def relation(self) -> Question | None:
        """Whether one bar stands left of another, or right of it."""
        first, second = self._two()
        lower = self.dice.chance(0.5)
        answer = "yes" if (first.left < second.left) == lower else "no"
        key = "left of" if lower else "right of"
        return self.book.ask("relation", key, answer, x=f"the {first.name} bar", y=f"the {second.name} bar")


def _offers(plan: Plan, dice: Dice, book: Phrasebook, held_out: bool) -> list[tuple[Asker, float]]:
    """What may be asked, and how likely each is."""
    scene = SceneAsker(plan, dice, book)
    shapes = ShapeAsker(plan.things, dice, book, held_out)
    offers: list[tuple[Asker, float]] = [(scene.background, 0.3), (scene.describe, 0.5)]
    if plan.chart:
        chart = ChartAsker(plan.chart, dice, book)
        offers += [(chart.highest, 0.9), (chart.lowest, 0.4), (chart.value, 1), (chart.value, 0.7), (chart.higher, 0.5)]
        offers += [(chart.count, 0.6), (chart.presence, 0.5), (chart.relation, 0.4)]
        return offers if held_out else _drilled(offers)
    if plan.lettering:
        text = TextAsker(plan.lettering, dice, book)
        offers += [(text.read, 1), (text.read_word, 1), (text.colour, 0.8), (text.position, 0.7), (scene.is_text, 0.27)]
        if plan.things:
            offers += [(shapes.colour, 0.4), (shapes.shape, 0.5), (shapes.presence, 0.5), (shapes.position, 0.4)]
        return offers if held_out else _drilled(offers)
    offers += [(shapes.colour, 0.9), (shapes.shape, 0.9), (shapes.count, 1), (shapes.count, 0.4), (scene.is_text, 0.27)]
    offers += [
        (shapes.presence, 1),
        (shapes.presence, 0.4),
        (shapes.position, 1),
        (shapes.relation, 1),
        (shapes.relation, 0.5),
    ]
    return offers if held_out else _drilled(offers)


def _drilled(offers: list[tuple[Asker, float]]) -> list[tuple[Asker, float]]:
    """The offers as training has them, by what their askers are called."""
    asked = {asker.__name__: asker for asker, _ in offers}
    seldom = [(asker, likely / 2 if asker.__name__ in SOON else likely) for asker, likely in offers]
    return seldom + [(asked[name], likely) for name, likely in LONG if name in asked]


def ask_all(plan: Plan, dice: Dice, held_out: bool) -> tuple[Question, ...]:
    """Ask about a scene.

    Args:
        plan: the scene.
        dice: the scene's.
        held_out: for the held-out split.

    Returns:
        FEWEST to MOST questions of LEAST_KINDS or more kinds, no prompt twice.
    """
    book = Phrasebook(dice, held_out)
    chosen: dict[str, Question] = {}
    kinds: Counter[str] = Counter()
    spare: list[Asker] = []
    for asker, likely in dice.shuffled(_offers(plan, dice, book, held_out)):
        if not dice.chance(likely) or len(chosen) == MOST:
            spare += [asker] if likely >= SPARE else []
        elif (question := asker()) is not None and (held_out or kinds[question.kind] < MOST_OF_A_KIND):
            kinds[question.kind] += question.prompt not in chosen
            chosen.setdefault(question.prompt, question)
    for asker in spare:
        if len(chosen) >= FEWEST and len({question.kind for question in chosen.values()}) >= LEAST_KINDS:
            break
        if (question := asker()) is not None:
            chosen.setdefault(question.prompt, question)
    return tuple(chosen.values())
