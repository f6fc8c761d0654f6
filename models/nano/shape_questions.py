"""Questions about coloured shapes. None is asked unless the picture leaves no doubt about its answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from nano.dice import Dice
from nano.phrases import Phrasebook, Question, plural, with_article
from nano.shapes import ALL_PAIRS, TRAIN_PAIRS, Thing
from nano.vocabulary import COLOURS, HELD_OUT_PAIRS, NINTHS, SHAPES

# How often a count is asked for, by the answer: few things being common, it would mostly be one.
COUNT_WEIGHTS = (0.55, 0.5, 1.0, 1.5, 2.0, 2.0)

TRIES = 4  # at a question that only some of a scene's shapes allow


def at(ninth: int) -> str:
    """Such as "at the top left", "in the centre"."""
    name = NINTHS[ninth]
    if name == "centre":
        return "in the centre"
    return f"on the {name}" if name in ("left", "right") else f"at the {name}"


@dataclass(frozen=True, slots=True)
class ShapeAsker:
    """Questions about the shapes of one scene.

    Attributes:
        things: the shapes.
        dice: the scene's.
        book: puts questions into words.
        held_out: whether shapes and colours that never go together in training may be mentioned.
    """

    things: tuple[Thing, ...]
    dice: Dice
    book: Phrasebook
    held_out: bool

    def _reference(self, thing: Thing) -> str | None:
        """Words that mean this one and no other."""
        options = []
        if sum(other.pair == thing.pair for other in self.things) == 1:
            options.append(f"the {thing.name}")
        if sum(other.shape == thing.shape for other in self.things) == 1:
            options.append(f"the {SHAPES[thing.shape]}")
        if sum(other.colour == thing.colour for other in self.things) == 1:
            options.append(f"the {COLOURS[thing.colour]} shape")
        if len(self.things) == 1:
            options.append("the shape")
        return self.dice.pick(options) if options else None

    def _stands_out(self, thing: Thing) -> bool:
        """Whether its place means it alone: "on the right" could be a shape at the top right as well."""
        others = [other for other in self.things if other is not thing]
        return {
            (True, False): all(other.column != thing.column for other in others),
            (False, True): all(other.row != thing.row for other in others),
        }.get((thing.row == 1, thing.column == 1), True)

    def colour(self) -> Question | None:
        """What colour the only circle is, or the shape at some place."""
        thing = self.dice.pick(self.things)
        answer = COLOURS[thing.colour]
        alone = sum(other.shape == thing.shape for other in self.things) == 1
        if alone and self.dice.chance(0.7):
            return self.book.ask("colour", "colour of", answer, x=f"the {SHAPES[thing.shape]}")
        return self.book.ask("colour", "colour at", answer, at=at(thing.ninth)) if self._stands_out(thing) else None

    def shape(self) -> Question | None:
        """What shape the only red one is, or the one at some place."""
        thing = self.dice.pick(self.things)
        answer = SHAPES[thing.shape]
        alone = sum(other.colour == thing.colour for other in self.things) == 1
        if alone and self.dice.chance(0.7):
            return self.book.ask("kind", "kind of", answer, x=f"the {COLOURS[thing.colour]} shape")
        return self.book.ask("kind", "kind at", answer, at=at(thing.ninth)) if self._stands_out(thing) else None

    def count(self) -> Question | None:
        """How many shapes, circles or red shapes there are."""
        what = self.dice.weighted(("all", "shape", "colour"), (0.3, 0.45, 0.25))
        if what == "all":
            return self.book.ask("count", "count", str(len(self.things)), things="shapes")
        if what == "shape":
            counts = Counter(thing.shape for thing in self.things)
            number = self._count_among(counts, len(SHAPES))
            noun = plural(SHAPES[number])
        else:
            counts = Counter(thing.colour for thing in self.things)
            number = self._count_among(counts, len(COLOURS))
            noun = f"{COLOURS[number]} shapes"
        return self.book.ask("count", "count", str(counts[number]), things=noun)

    def _count_among(self, counts: Counter[int], total: int) -> int:
        """What to count: the answer is chosen first, then a shape or colour with it."""
        answers = sorted({counts[number] for number in range(total)})
        answer = self.dice.weighted(answers, [COUNT_WEIGHTS[number] for number in answers])
        return self.dice.pick([number for number in range(total) if counts[number] == answer])

    def presence(self) -> Question | None:
        """Whether there is a red circle, a circle or a red shape."""
        there = self.dice.chance(0.5)
        what = self.dice.weighted(("pair", "shape", "colour"), (0.6, 0.2, 0.2))
        thing = self.dice.pick(self.things)
        if what == "pair":
            shape, colour = thing.pair if there else self._absent_pair()
            noun = f"{COLOURS[colour]} {SHAPES[shape]}"
        elif what == "shape":
            absent = sorted(set(range(len(SHAPES))) - {other.shape for other in self.things})
            noun = SHAPES[thing.shape if there else self.dice.pick(absent)]
        else:
            absent = sorted(set(range(len(COLOURS))) - {other.colour for other in self.things})
            noun = f"{COLOURS[thing.colour if there else self.dice.pick(absent)]} shape"
        return self.book.ask("presence", "presence", "yes" if there else "no", a_thing=with_article(noun))

    def _absent_pair(self) -> tuple[int, int]:
        """Mostly one that shares its shape, its colour or both with what is there, but not together."""
        shapes = {thing.shape for thing in self.things}
        colours = {thing.colour for thing in self.things}
        absent = sorted((ALL_PAIRS if self.held_out else TRAIN_PAIRS) - {thing.pair for thing in self.things})
        if self.held_out and self.dice.chance(0.3):  # or the answer about these pairs would mostly be yes
            return self.dice.pick([pair for pair in absent if pair in HELD_OUT_PAIRS])
        near = [pair for pair in absent if pair[0] in shapes and pair[1] in colours]
        if near and self.dice.chance(0.5):
            return self.dice.pick(near)
        near = [pair for pair in absent if (pair[0] in shapes) != (pair[1] in colours)]
        return self.dice.pick(near if near and self.dice.chance(0.8) else absent)

    def position(self) -> Question | None:
        """Where one of them is."""
        thing = self.dice.pick(self.things)
        words = self._reference(thing)
        return self.book.ask("position", "position", NINTHS[thing.ninth], x=words) if words else None

    def relation(self) -> Question | None:
        """Whether one is left of, right of, above or below another, or what is."""
        for _ in range(TRIES if len(self.things) > 1 else 0):
            question = self._what_is() if self.dice.chance(0.3) else self._compared()
            if question:
                return question
        return None

    def _compared(self) -> Question | None:
        """Whether one lies on that side of another, in another row or column."""
        first, second = self.dice.shuffled(self.things)[:2]
        upright = self.dice.chance(0.5)
        before, after = (first.row, second.row) if upright else (first.column, second.column)
        words, others = self._reference(first), self._reference(second)
        if before == after or words is None or others is None:
            return None
        lower = self.dice.chance(0.5)
        key = ("above" if lower else "below") if upright else ("left of" if lower else "right of")
        answer = "yes" if (before < after) == lower else "no"
        return self.book.ask("relation", key, answer, x=words, y=others)

    def _what_is(self) -> Question | None:
        """What is above another: asked where just one is higher, and no third looks a little higher."""
        base = self.dice.pick(self.things)
        words = self._reference(base)
        upright, sign = self.dice.chance(0.5), self.dice.pick((-1, 1))
        beyond = []
        for thing in self.things:
            ahead = sign * ((thing.y - base.y) if upright else (thing.x - base.x))
            apart = (thing.row != base.row) if upright else (thing.column != base.column)
            if ahead > 0 and apart:
                beyond.append(thing)
            elif ahead > 0.05:
                return None
        if len(beyond) != 1 or words is None:
            return None
        names = {(True, -1): "above", (True, 1): "below", (False, -1): "left of", (False, 1): "right of"}
        return self.book.ask("relation", "what is", beyond[0].name, relation=names[upright, sign], y=words)
