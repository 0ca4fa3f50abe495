"""Generated sentences in which spans of number words are tagged by what they count. BIO.

What a number counts is said by the verb, some words before it; nothing after a word is needed to tag it, so a tagger
that reads from left to right can answer while the text is still arriving. `no one` holds no number. Numbers are written
without `and`, since whether `and` goes on with a number shows only in the word after it.
"""

import random
from collections.abc import Sequence

from training.data.generated.distinct import distinct_splits
from training.data.generated.numbers import english
from training.data.rows import Row

WHO = ["she", "he", "anna", "peter", "the-guest", "my-friend", "our-neighbour", "the-clerk", "nobody", "everyone"]
VERBS = {
    "MONEY": ["paid", "owed", "spent", "lent", "saved"],
    "TIME": ["waited", "slept", "worked", "rested", "travelled"],
    "COUNT": ["counted", "found", "sold", "packed", "ordered"],
}
BETWEEN = (
    "",
    "about",
    "at least",
    "in the end",
    "as far as we know",
    "no one knows why but maybe",
    "with no one there",
)
AFTER = ("", "in all", "that day", "and went home", "which no one believed", "before noon")


def make(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    return distinct_splits(_draw, seed, sizes)


def _draw(source: random.Random) -> Row:
    words: list[str] = []
    tags: list[str] = []
    for clause in range(source.randint(1, 2)):
        kind = source.choice(list(VERBS))
        opening = [*(["and"] if clause else []), *source.choice(WHO).split("-"), source.choice(VERBS[kind])]
        number = _number_words(source)
        _add(words, tags, [*opening, *source.choice(BETWEEN).split()])
        words += number
        tags += [f"B-{kind}", *[f"I-{kind}"] * (len(number) - 1)]
        _add(words, tags, source.choice(AFTER).split())
    _add(words, tags, ["."])
    return Row(tuple(words), tuple(tags))


def _number_words(source: random.Random) -> list[str]:
    """A number in words of its own each, or in figures."""
    number = source.randint(1, 10 ** source.randint(1, 4))
    return [str(number)] if source.random() < 0.2 else english(number).replace(" and ", " ").replace("-", " ").split()


def _add(words: list[str], tags: list[str], more: list[str]) -> None:
    words += more
    tags += ["O"] * len(more)
