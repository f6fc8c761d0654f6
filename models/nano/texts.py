"""What signs say: words, numbers, and for training words that are none."""

from __future__ import annotations

from nano.dice import Dice
from nano.lexicon import HELD_OUT_WORDS, TRAIN_WORDS
from nano.vocabulary import ALPHABET, held_out_number

DIGITS, LETTERS = "0123456789", "abcdefghijklmnopqrstuvwxyz"
SAME_IN_CAPITALS = frozenset("cosuvwxz")  # letters whose case shows only beside others
SHORTEST, LONGEST = 3, 8  # letters of an invented word
INVENTED = 0.6  # of the words in training pictures: from real ones alone, these would be learnt instead of letters


def choose_text(dice: Dice, held_out: bool, invents: bool) -> str:
    """A word in one of three cases, or a number of two to five digits.

    Args:
        dice: the scene's.
        held_out: one of the held-out split.
        invents: INVENTED of the words may be made up, as in training.
    """
    if dice.chance(0.3):
        digits = dice.whole(2, 5)
        while True:
            number = dice.whole(10 ** (digits - 1), 10**digits - 1)
            if held_out_number(number) == held_out:
                return str(number)
    if invents and dice.chance(INVENTED):
        return cased(dice, invented_word(dice))
    return cased(dice, dice.pick(HELD_OUT_WORDS if held_out else TRAIN_WORDS))


def cased(dice: Dice, word: str) -> str:
    """A word in small letters, capitals, or with a capital."""
    return dice.pick((word, word.upper(), word.capitalize()))


def invented_word(dice: Dice) -> str:
    """The beginning of one word and the end of another: letters follow each other as in words. None is held out."""
    while True:
        first, second = dice.pick(TRAIN_WORDS), dice.pick(TRAIN_WORDS)
        word = first[: dice.whole(1, len(first) - 1)] + second[-dice.whole(1, len(second) - 1) :]
        if SHORTEST <= len(word) <= LONGEST and _can_be_shown(word):
            return word


def characters(dice: Dice) -> str:
    """Letters, or letters and digits, that don't follow any rule; of every sort the rare ones as often as others."""
    count = dice.whole(2, 6)
    if dice.chance(0.3):
        mixed = "".join(dice.pick(ALPHABET) for _ in range(count))
        if not _can_be_shown(mixed.lower()) or _number_held_out(mixed):
            return characters(dice)
        return mixed
    word = "".join(dice.pick(LETTERS) for _ in range(count))
    return cased(dice, word) if _can_be_shown(word) else characters(dice)


def _can_be_shown(word: str) -> bool:
    """Whether the case can be seen, and the word isn't one for judging."""
    return not set(word) <= SAME_IN_CAPITALS and word not in HELD_OUT_WORDS


def _number_held_out(text: str) -> bool:
    return text.isdigit() and held_out_number(int(text))
