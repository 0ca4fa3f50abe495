"""Generated reviews in which negation and order decide, not the words themselves.

Every template is used with both verdicts, and most hold one word of praise and one of blame, so that the set of words
in a review says almost nothing about its label. In `{good} , not {bad}` only the order tells.
"""

import random
from collections.abc import Sequence

from training.data.generated.distinct import distinct_splits
from training.data.rows import Row

NEGATIVE, POSITIVE = "negative", "positive"
PRAISE = [
    "good",
    "great",
    "funny",
    "moving",
    "brilliant",
    "clever",
    "fresh",
    "gripping",
    "charming",
    "superb",
    "lovely",
    "sharp",
]
BLAME = ["bad", "awful", "dull", "weak", "boring", "stupid", "stale", "tedious", "clumsy", "dreadful", "ugly", "flat"]
SUBJECTS = [
    "film",
    "story",
    "plot",
    "acting",
    "music",
    "ending",
    "cast",
    "script",
    "scenery",
    "dialogue",
    "hero",
    "camera",
    "work",
    "pace",
    "humour",
]
# {x} is a word that agrees with the verdict, {y} one that contradicts it.
TEMPLATES = (
    "the {s} was {x} .",
    "the {s} was not {y} .",
    "the {s} was {x} , not {y} .",
    "the {s} was not {y} but {x} .",
    "i expected the {s} to be {y} , but it was {x} .",
    "the {s} was {x} , though i had expected it to be {y} .",
    "the {s} was more {x} than {y} .",
    "what began as {y} ended as {x} .",
    "nobody could call the {s} {y} .",
    "the {s} is never {y} and always {x} .",
    "they told me the {s} was {y} ; they were wrong .",
    "they told me the {s} was {x} ; they were right .",
)
FRAMES = (
    "{v}",
    "we saw it on a rainy evening . {v}",
    "my brother took me along . {v}",
    "{v} that is all there is to say .",
    "{v} we talked about it on the way home .",
    "a word about the {s} first . {v}",
)


def make(seed: int, sizes: Sequence[int]) -> dict[str, list[Row]]:
    return distinct_splits(_draw, seed, sizes)


def _draw(source: random.Random) -> Row:
    label = source.choice((NEGATIVE, POSITIVE))
    agreeing, contradicting = (PRAISE, BLAME) if label == POSITIVE else (BLAME, PRAISE)
    verdict = source.choice(TEMPLATES).format(
        s=source.choice(SUBJECTS), x=source.choice(agreeing), y=source.choice(contradicting)
    )
    return Row(source.choice(FRAMES).format(v=verdict, s=source.choice(SUBJECTS)), label)
