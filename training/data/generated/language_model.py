"""Generated sentences with a long-range rule: a verb agrees in number with a subject some words before it."""

import random
from collections.abc import Sequence

from training.data.generated.distinct import distinct_splits
from training.data.rows import Row

NOUNS = ["dog", "cat", "child", "farmer", "bird", "teacher", "sailor", "horse", "doctor", "singer"]
VERBS = ["see", "hear", "like", "follow", "help", "know", "find", "call"]
QUIET = ["sleep", "run", "sing", "wait", "laugh", "swim"]
ADJECTIVES = ["old", "small", "happy", "tired", "clever", "quiet"]
PLACES = ["garden", "house", "river", "street", "school", "market"]


def make(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    return distinct_splits(lambda source: Row(None, (_sentence(source),)), seed, sizes)


def _sentence(source: random.Random) -> str:
    subject, plural = _phrase(source, depth=1)
    verb = source.choice(QUIET) if source.random() < 0.3 else source.choice(VERBS)
    ending = f"near the {source.choice(PLACES)}" if verb in QUIET else _phrase(source, depth=0)[0]
    return f"{subject} {_agree(verb, plural)} {ending} ."


def _phrase(source: random.Random, depth: int) -> tuple[str, bool]:
    """A noun phrase, and whether it is plural. depth: how many clauses may stand between noun and verb."""
    plural = source.random() < 0.5
    noun = _plural(source.choice(NOUNS)) if plural else source.choice(NOUNS)
    adjective = f"{source.choice(ADJECTIVES)} " if source.random() < 0.5 else ""
    words = f"{source.choice(('the', 'some' if plural else 'a'))} {adjective}{noun}"
    if adjective.startswith("old") and words.startswith("a "):
        words = f"an{words[1:]}"
    if depth and source.random() < 0.5:
        other, other_plural = _phrase(source, depth - 1)
        words = f"{words} that {other} {_agree(source.choice(VERBS), other_plural)}"
    return words, plural


def _plural(noun: str) -> str:
    return "children" if noun == "child" else f"{noun}s"


def _agree(verb: str, plural: bool) -> str:
    return verb if plural else f"{verb}s"
