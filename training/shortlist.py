"""Learn a shortlist from training pairs: which target tokens each source token is translated into.

IBM model 1 (Brown et al. 1993, "The mathematics of statistical machine translation", section 4.2), a few rounds of
expectation maximisation on tensors. The end of sentence, which stands in every source, serves as its empty word.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from seqmodels.errors import ConfigError, DataError
from seqmodels.pretrained import load_pretrained
from seqmodels.shortlist import FILE, NONE, Shortlist
from seqmodels.tokenizer import EOS, SPECIAL_TOKENS
from training.config import Recipe
from training.data.examples import Codec, Example
from training.data.sources import load_rows

ROUNDS = 5
MAX_PAIRS = 100_000  # of sentences; more change little
MAX_LINKS = 10_000_000  # pairs of tokens in them: all stand in memory at once, in up to 120 bytes each


def add_shortlist(directory: Path, recipe: Recipe, translations: int, frequent: int) -> Path:
    """Learn one from the training split of the recipe, and put it into a finished translator's directory.

    Raises ConfigError where the model does not read text and write text, DataError where there is
    nothing to learn from.
    """
    saved = load_pretrained(directory)
    if saved.source_tokenizer is None or saved.target_tokenizer is None:
        raise ConfigError(f"{directory} does not translate text into text, so there is no shortlist to learn")
    vocab_sizes = saved.source_tokenizer.vocab_size, saved.target_tokenizer.vocab_size
    examples = Codec.of(saved, recipe.data).encode(load_rows(recipe, ["train"], print)["train"])
    pairs = [(torch.tensor(one.inputs), torch.tensor(_words(one))) for one in examples if _words(one)]
    shortlist = learn_shortlist(pairs, vocab_sizes, translations, frequent)
    shortlist.save(directory, saved)
    lengths = torch.tensor([float(len(shortlist.of(source))) for source, _ in pairs[:1000]])
    print(f"lists of {lengths.median():.0f} of {vocab_sizes[1]} tokens in the median, {lengths.max():.0f} at most")
    return directory / FILE


def _words(example: Example) -> list[int]:
    """Its target tokens, between BOS and EOS."""
    assert isinstance(example.targets, list)
    return example.targets[1:-1]


def learn_shortlist(
    pairs: Sequence[tuple[Tensor, Tensor]], vocab_sizes: tuple[int, int], translations: int, frequent: int
) -> Shortlist:
    """pairs: token ids of source (S,) and target (T,). vocab_sizes: of source and target.

    translations: target tokens kept for each source token. frequent: of the most frequent target tokens, which are on
    every list, as EOS is. Raises DataError where there are no pairs.
    """
    source_size, target_size = vocab_sizes
    pairs = _drawn(pairs)
    links, places = _links(pairs, target_size)
    kinds, kind = torch.unique(links, return_inverse=True)  # each pair of a source and a target token that occurs
    probability = _model_1(kinds // target_size, kind, places, source_size)
    counts = torch.cat([target for _, target in pairs]).bincount(minlength=target_size)
    words = counts[len(SPECIAL_TOKENS) :]  # an answer of <unk> alone would be none
    common = words.topk(min(frequent, len(words))).indices + len(SPECIAL_TOKENS)
    always = torch.cat([common, torch.tensor([EOS])]).sort().values.int()
    likely = _best_of_each(kinds // target_size, kinds % target_size, probability, source_size, translations)
    return Shortlist(likely, always)


def _drawn(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """As many of them, in random order, as memory is meant for."""
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))[:MAX_PAIRS].tolist()
    drawn, num_links = [], 0
    for source, target in (pairs[i] for i in order):
        if num_links + len(source) * len(target) <= MAX_LINKS:
            drawn.append((source, target))
            num_links += len(source) * len(target)
    if not drawn:
        raise DataError(
            "there is no pair of sentences to learn a shortlist from: each is empty, or longer than the model or "
            "data.max_target_length allows; look at data.splits.train and data.columns"
        )
    return drawn


def _links(pairs: Sequence[tuple[Tensor, Tensor]], target_size: int) -> tuple[Tensor, Tensor]:
    """Each source token beside each target token of its sentence, as source * target_size + target; and which target
    token of all sentences it stands beside. Both (number of links,)."""
    links, places, seen = [], [], 0
    for source, target in pairs:
        links.append((source[:, None] * target_size + target).flatten())
        places.append((seen + torch.arange(len(target))).expand(len(source), -1).flatten())
        seen += len(target)
    return torch.cat(links), torch.cat(places)


def _model_1(source: Tensor, kind: Tensor, places: Tensor, source_size: int) -> Tensor:
    """t(target | source) of each kind of link (K,). source: (K,) its source token; kind, places: of each link."""
    probability = torch.ones(len(source))
    for _ in range(ROUNDS):
        share = probability[kind]
        share /= torch.zeros(int(places.max()) + 1).index_add_(0, places, share)[places]  # of each target token's cause
        counts = torch.zeros(len(source)).index_add_(0, kind, share)
        probability = counts / torch.zeros(source_size).index_add_(0, source, counts)[source]
    return probability


def _best_of_each(source: Tensor, target: Tensor, probability: Tensor, source_size: int, count: int) -> Tensor:
    """The `count` likeliest targets of each source token: (source_size, count) of int32, NONE where there are fewer."""
    order = probability.argsort(descending=True, stable=True)
    order = order[source[order].argsort(stable=True)]  # by source token, the likeliest first
    source, target = source[order], target[order]
    first = torch.searchsorted(source, torch.arange(source_size))
    rank = torch.arange(len(source)) - first[source]
    kept = rank < count
    table = torch.full((source_size, count), NONE, dtype=torch.int32)
    table[source[kept], rank[kept]] = target[kept].int()
    return table
