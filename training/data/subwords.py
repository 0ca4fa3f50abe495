"""Words spelt by other pieces each time that they are trained on: BPE-dropout (Provilkov et al. 2020).

A word that is always one piece teaches nothing about its parts. Where some merges are passed over at random, a model
meets the smaller pieces too, in all their company; what it is asked later is split as ever.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import numpy as np

from seqmodels.tokenizer import BOS, EOS, Tokenizer
from training.data.encoded import Encoded
from training.data.examples import Codec, Example

WAYS = 32  # in which a word is split at most: those that often come are split once for all
CACHED = 2**18  # words, each in one of its ways: some 60 MB


class SubwordDropout:
    """Examples -> the same texts in other pieces, a pure function of (seed, epoch)."""

    def __init__(self, codec: Codec, dropout: float, seed: int) -> None:
        """dropout: how often a possible merge is passed over; 0 splits as the tokenizer does."""
        self._seed = seed
        self._source = Splitter(codec.source_tokenizer, dropout, seed) if codec.source_tokenizer else None
        self._target = Splitter(codec.target_tokenizer, dropout, seed) if codec.target_tokenizer else None

    def __call__(self, examples: Sequence[Example], epoch: int) -> Sequence[Example]:
        """All at once, for those of one length to be put together."""
        draw = np.random.default_rng([self._seed, epoch, 1])
        split = (self._split(example, draw) for example in examples)
        return Encoded.of(split) if isinstance(examples, Encoded) else list(split)

    def _split(self, example: Example, draw: np.random.Generator) -> Example:
        if self._source:
            inputs = self._source(example.inputs, draw)
            example = replace(example, inputs=inputs, input_length=len(inputs))
        if self._target:
            targets = self._target(example.targets, draw)
            example = replace(example, targets=targets, target_length=len(targets))
        return example


class Splitter:
    """Of a tokenizer of kind `bpe`: token ids of a text -> ids of the same text, its words split anew."""

    def __init__(self, tokenizer: Tokenizer, dropout: float, seed: int) -> None:
        self._tokenizer, self._ranks, self._ids = tokenizer, tokenizer.merges(), tokenizer.ids()
        self._dropout, self._seed = dropout, seed
        self._way = lru_cache(CACHED)(self.split)

    def __call__(self, ids: Sequence[int], draw: np.random.Generator) -> list[int]:
        """ids: BOS and EOS may stand around the text. Half a character, where a long text was cut off, stays as it is,
        and so does all of that text."""
        first, last = int(ids[0] == BOS), len(ids) - (ids[-1] == EOS)
        words = self._tokenizer.words(ids[first:last])
        if words is None:
            return list(ids)
        ways = draw.integers(WAYS, size=len(words)).tolist()
        pieces = (piece for word, way in zip(words, ways, strict=True) for piece in self._way(word, way))
        return [*ids[:first], *pieces, *ids[last:]]

    def split(self, word: str, way: int) -> tuple[int, ...]:
        """The pieces of a word: at each step, of all merges that are possible and not passed over, the one learned
        first is made, at its first place."""
        drawn = random.Random(f"{self._seed}:{way}:{word}").random
        pieces = list(word)
        while possible := [
            (self._ranks[pair], place)
            for place, pair in enumerate(pairwise(pieces))
            if pair in self._ranks and drawn() >= self._dropout
        ]:
            _, place = min(possible)
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
        return tuple(self._ids[piece] for piece in pieces)
