"""What the fuzz asks: one request in five is valid, the others are valid ones that were damaged.

A request depends on a seed and its number alone (but for when its state expires), and can be made again.
"""

import random
from dataclasses import replace

from . import fuzz_bodies as bodies
from . import fuzz_envelopes as envelopes
from .fuzz_valid import Ask, Bank, asking

ONE_IN = 5  # requests are valid
DAMAGES = {
    damage.__name__.replace("_", " "): damage
    for damage in (
        bodies.values, bodies.nesting, bodies.numbers, bodies.surrogates, bodies.broken_bytes, bodies.encodings,
        bodies.duplicate_keys, bodies.nothing, envelopes.content_types, envelopes.multipart, envelopes.compressed,
        envelopes.headers, envelopes.paths, envelopes.queries, bodies.states, bodies.options, bodies.pictures,
        bodies.base64_damage, bodies.batches, bodies.large, envelopes.leaving, bodies.tasks,
    )
}  # fmt: skip
COSTLY = ("pictures", "batches", "large", "queries")  # rarer, so that there is time for more of the others
KINDS = tuple(DAMAGES)
WEIGHTS = tuple(1 if kind in COSTLY else 2 for kind in KINDS)


def request(bank: Bank, seed: int, number: int) -> Ask:
    """The one of that number."""
    chance = random.Random(f"{seed}:{number}")
    if number % ONE_IN == 0:
        golden = bank.choose(chance)
        return replace(asking(golden), kind="valid", golden=golden)
    (kind,) = chance.choices(KINDS, WEIGHTS)
    return replace(DAMAGES[kind](chance, bank), kind=kind)
