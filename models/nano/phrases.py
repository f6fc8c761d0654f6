"""How things are asked: several phrasings of each question, in two spellings and a few styles."""

from __future__ import annotations

from dataclasses import dataclass

from nano.dice import Dice
from nano.vocabulary import COLOURS, SHAPES

PHRASES: dict[str, tuple[str, ...]] = {
    "colour of": ("What colour is {x}?", "Which colour is {x}?", "What is the colour of {x}?", "{X} is what colour?"),
    "colour at": (
        "What colour is the shape {at}?",
        "Which colour is the shape {at}?",
        "What is the colour of the shape {at}?",
        "The shape {at} is what colour?",
    ),
    "background": (
        "What colour is the background?",
        "Which colour is the background?",
        "What is the background colour?",
        "What is the colour of the background?",
    ),
    "colour of text": (
        "What colour is the {text}?",
        "Which colour is the {text}?",
        "What is the colour of the {text}?",
        "In what colour is the {text} written?",
    ),
    "kind of": ("What shape is {x}?", "What kind of shape is {x}?", "Which shape is {x}?", "Name the {x_only}."),
    "kind at": ("What shape is {at}?", "Which shape is {at}?", "What kind of shape is {at}?", "Name the shape {at}."),
    "count": (
        "How many {things} are there?",
        "How many {things} do you see?",
        "Count the {things}.",
        "How many {things} are in the image?",
        "What is the number of {things}?",
    ),
    "presence": (
        "Is there {a_thing}?",
        "Is there {a_thing} in the image?",
        "Do you see {a_thing}?",
        "Does the picture show {a_thing}?",
        "Can you see {a_thing}?",
    ),
    "position": (
        "Where is {x}?",
        "Where in the image is {x}?",
        "In which part of the picture is {x}?",
        "What is the position of {x}?",
    ),
    "left of": (
        "Is {x} left of {y}?",
        "Is {x} to the left of {y}?",
        "Does {x} lie left of {y}?",
        "Is {x} further left than {y}?",
    ),
    "right of": (
        "Is {x} right of {y}?",
        "Is {x} to the right of {y}?",
        "Does {x} lie right of {y}?",
        "Is {x} further right than {y}?",
    ),
    "above": ("Is {x} above {y}?", "Is {x} higher up than {y}?", "Does {x} lie above {y}?", "Is {x} over {y}?"),
    "below": ("Is {x} below {y}?", "Is {x} lower down than {y}?", "Does {x} lie below {y}?", "Is {x} under {y}?"),
    "what is": (
        "What is {relation} {y}?",
        "Which shape is {relation} {y}?",
        "What lies {relation} {y}?",
        "What can be seen {relation} {y}?",
    ),
    "read": ("What does the sign say?", "What is written?", "Read the text.", "What does the text say?"),
    "read word": ("Read the word.", "Which word is written?", "What is the word?", "What word do you see?"),
    "read number": ("Read the number.", "Which number is written?", "What is the number?", "What number do you see?"),
    "highest": (
        "Which bar is highest?",
        "Which bar is the tallest?",
        "What colour is the highest bar?",
        "Which bar has the greatest value?",
    ),
    "lowest": (
        "Which bar is lowest?",
        "Which bar is the shortest?",
        "What colour is the lowest bar?",
        "Which bar has the smallest value?",
    ),
    "value": (
        "What is the value of {x}?",
        "What value does {x} have?",
        "How high is {x}?",
        "Read the value of {x}.",
    ),
    "higher": (
        "Is {x} higher than {y}?",
        "Is {x} taller than {y}?",
        "Does {x} have a greater value than {y}?",
        "Is the value of {x} greater than that of {y}?",
    ),
    "describe": (
        "Describe the image.",
        "Describe the picture.",
        "What does the image show?",
        "What is in this picture?",
        "What do you see?",
    ),
}
STYLES = ("as it is", "small first letter", "no mark")
EVERY_STYLE = (*STYLES, "small, no mark")


@dataclass(frozen=True, slots=True)
class Question:
    """A question about a picture.

    Attributes:
        kind: one of KINDS.
        prompt: as a user might type it.
        answer: the only right one; compared as it is.
    """

    kind: str
    prompt: str
    answer: str


def with_article(noun: str) -> str:
    """Such as "a circle", "an orange circle"."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """Such as "crosses", "red circles"."""
    return noun + ("es" if noun.endswith("s") else "s")


def listed(items: list[str]) -> str:
    """Such as "a", "a and b", "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def template_of(prompt: str) -> str:
    """The prompt without its colours, shapes, spelling and style: what stays tells nothing about the picture."""
    words = prompt.lower().rstrip(".?").replace("color", "colour").split()
    shapes = {*SHAPES, *(plural(shape) for shape in SHAPES)}
    words = ["#" if word in COLOURS else "@" if word in shapes else word for word in words]
    return " ".join(word for word in words if word not in ("a", "an"))


class Phrasebook:
    """Asks questions in the words and the style that the dice choose."""

    def __init__(self, dice: Dice, held_out: bool) -> None:
        """Use the scene's dice; only held-out questions may lack both capital and mark."""
        self._dice = dice
        self._styles = EVERY_STYLE if held_out else STYLES
        self._weights = (6, 1, 1, 1)[: len(self._styles)]

    def ask(self, kind: str, key: str, answer: str, **parts: str) -> Question:
        """Put a question into words.

        Args:
            kind: one of KINDS.
            key: of PHRASES.
            answer: the right one.
            parts: what the phrasing's braces stand for; `X` is made of `x`.
        """
        if "x" in parts:
            parts = {**parts, "X": parts["x"].capitalize(), "x_only": parts["x"].removeprefix("the ")}
        prompt = self._dice.pick(PHRASES[key]).format(**parts)
        if self._dice.chance(0.4):
            prompt = prompt.replace("colour", "color")
        style = self._dice.weighted(self._styles, self._weights)
        if "small" in style:
            prompt = prompt[0].lower() + prompt[1:]
        return Question(kind, prompt.rstrip("?.") if "no mark" in style else prompt, answer)
