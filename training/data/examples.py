"""Codec: how Rows become token ids, label numbers and picture tensors. Trained on the training split alone.

Knows tokenizers, labels and pictures; knows no batch. The same tokenizers and preprocessor go into the model
directory, so a model is trained on what it will be served.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from seqmodels.characters import with_spellings
from seqmodels.config import ModelConfig
from seqmodels.errors import ConfigError, DataError
from seqmodels.losses import IGNORE
from seqmodels.preprocessing import Preprocessor
from seqmodels.pretrained import Pretrained, load_pretrained
from seqmodels.tokenizer import BOS, EOS, Tokenizer
from seqmodels.vision import Backbone, Vectors
from training.config import DataSection, Facts, Recipe, some
from training.data.grids import Grids, Say, cache_directory, grids_of
from training.data.pictures import decode, preprocessor_for
from training.data.rows import Row, in_order

SMALLEST_DEVIATION = 1e-6  # of a regression's targets, as a share of the largest: float32 tells no less apart


@dataclass(frozen=True, slots=True)
class Example:
    """One row as numbers.

    inputs: token ids (with the spellings of their words, a tensor), steps of numbers, or pictures still in their files;
    None where nothing goes in.
    targets: a label, 0 or 1 for each label, numbers, a label for each position, or BOS w1 ... wn EOS. Lengths count
    positions, 0 where there are none. references: of a picture or clip, all its texts, of which targets are
    one.
    """

    inputs: Any
    targets: Any
    input_length: int
    target_length: int
    references: tuple[str, ...] = ()


@dataclass(frozen=True)
class Codec:
    """What turns a Row into Examples, and what a model directory holds beside the weights."""

    config: ModelConfig
    source_tokenizer: Tokenizer | None
    target_tokenizer: Tokenizer | None
    preprocessor: Preprocessor | None
    max_target_length: int
    grids: Grids | None = None  # of pictures, where they are known

    @classmethod
    def train(cls, recipe: Recipe, rows: Sequence[Row]) -> "Codec":
        """Tokenizers and labels from the rows of the training split; those of `model.init_from`, where it is set."""
        if recipe.init_from is not None:
            saved = load_pretrained(recipe.init_from)
            target = saved.target_tokenizer if recipe.makes_text else None
            # What a language model wrote in, a classifier that starts from it reads.
            source = (saved.source_tokenizer or saved.target_tokenizer) if recipe.input == "text" else None
        else:
            source = _tokenizer(recipe.data, _source_texts(rows)) if recipe.input == "text" else None
            target = _tokenizer(recipe.data, _target_texts(rows)) if recipe.makes_text else None
        return cls.build(recipe, source, target, _facts(recipe, rows))

    @classmethod
    def build(cls, recipe: Recipe, source: Tokenizer | None, target: Tokenizer | None, facts: Facts) -> "Codec":
        """Put together what was trained now, or before a run was interrupted. facts: without the sizes of vocabularies.

        Raises DataError where `model` and data do not fit.
        """
        sizes = source.vocab_size if source else 0, target.vocab_size if target else 0
        facts = replace(facts, source_vocab_size=sizes[0], target_vocab_size=sizes[1])
        config = recipe.model_config_with(facts)
        expected = getattr(config.encoder, "feature_size", facts.feature_size)
        if facts.feature_size != expected:  # the saved model's, where the run starts from one
            raise DataError(
                f"steps hold {facts.feature_size} numbers, but the model of model.init_from takes {expected}"
            )
        if unknown := sorted(config.class_weights.keys() - set(config.labels)):
            raise DataError(
                f"model.class_weights has {unknown[0]!r}, which is no label; there are {some(config.labels)}"
            )
        return cls(config, source, target, preprocessor_for(config), recipe.data.max_target_length)

    @classmethod
    def of(cls, saved: Pretrained, data: DataSection) -> "Codec":
        """A finished model's."""
        return cls(
            saved.config, saved.source_tokenizer, saved.target_tokenizer, saved.preprocessor, data.max_target_length
        )

    def encode(self, rows: Iterable[Row]) -> list[Example]:
        """All at once, see `examples`."""
        return list(self.examples(rows))

    def examples(self, rows: Iterable[Row]) -> Iterator[Example]:
        """An Example for each reference of each row.

        A classifier reads the beginning of an input that is too long; for the others, what is too long is left out.
        """
        return (example for row in rows for example in self._examples(row) if self._fits(example))

    def with_grids(
        self, backbone: Backbone, rows: Iterable[Row], told: Say, dtype: torch.dtype = torch.float16
    ) -> "Codec":
        """The same, with what the backbone makes of each picture or frame of the rows in its place; see grids.py."""
        assert self.preprocessor is not None
        pictures = (picture for row in rows for picture in row.pictures)
        made_by = Vectors(backbone) if self.config.input == "frames" else backbone
        return replace(self, grids=grids_of(pictures, made_by, self.preprocessor, cache_directory(), told, dtype))

    def decode_picture(self, data: bytes) -> Tensor:
        """A picture's file -> (C, H, W), or the backbone's grid of it, (D, h, w), or vector of a frame, (V,). Raises
        InputError."""
        if self.grids is not None and (grid := self.grids.get(data)) is not None:
            return grid
        assert self.preprocessor is not None
        return decode(self.preprocessor, data)

    def _examples(self, row: Row) -> Iterable[Example]:
        if self.config.architecture == "tagger":
            yield self._tagged(row)
            return
        inputs, length = self._inputs(row)
        if self.config.architecture == "classifier":
            yield Example(inputs, self._classified(row), length, 0)
            return
        assert self.target_tokenizer is not None
        for text in row.references:
            targets = [BOS, *self.target_tokenizer.encode(text), EOS]
            yield Example(
                inputs, targets, length, len(targets), row.references if self.config.task == "caption" else ()
            )

    def _inputs(self, row: Row) -> tuple[Any, int]:
        """What the encoder reads, and its number of positions (1 for an image, 0 for nothing)."""
        if row.input is None or isinstance(row.input, bytes):
            return row.input, int(row.input is not None)
        if not isinstance(row.input, str):
            inputs: Sequence[Any] = row.input
        elif self.config.architecture == "generator":
            inputs = self._source.encode_source(row.input)
        else:
            inputs = self._source.encode(row.input)
        if self.config.architecture == "classifier":
            inputs = inputs[: self.config.max_source_length]
        return inputs, len(inputs)

    def _tagged(self, row: Row) -> Example:
        labels = [self._label(tag) for tag in row.target]
        assert isinstance(row.input, tuple)
        if self.source_tokenizer is None:
            return Example(row.input, labels, len(row.input), 0)
        words = [str(word) for word in row.input]
        ids, last = self._source.encode_words(words)
        targets = [IGNORE] * len(ids)
        for position, label in zip(last, labels, strict=True):
            targets[position] = label
        characters = self.config.characters
        inputs = with_spellings(ids, last, words, characters.max_length) if characters else ids
        return Example(inputs, targets, len(ids), 0)

    def _classified(self, row: Row) -> int | list[int] | list[float]:
        match self.config.problem_type:
            case "regression":
                if len(row.references) != len(self.config.labels):
                    raise DataError(
                        f"data.columns.target names {len(row.references)} columns, but the model gives "
                        f"{len(self.config.labels)} numbers ({some(self.config.labels)}); name as many"
                    )
                return [float(number) for number in row.references]
            case "multi_label_classification":
                return [int(label in row.references) for label in self.config.labels]
        assert isinstance(row.target, str)
        return self._label(row.target)

    @property
    def _source(self) -> Tokenizer:
        assert self.source_tokenizer is not None
        return self.source_tokenizer

    def _label(self, name: str) -> int:
        """Its number; IGNORE for one that the training split does not have."""
        return self.config.labels.index(name) if name in self.config.labels else IGNORE

    def _fits(self, example: Example) -> bool:
        if self.config.input != "nothing" and not example.input_length:
            return False
        # A language model reads running text, of any length.
        text_fits = self.config.input == "nothing" or example.target_length <= self.max_target_length + 2
        ends = self.config.architecture == "generator" and self.config.input == "text"  # the source's own EOS
        return text_fits and example.input_length <= self.config.max_source_length + ends


def _tokenizer(data: DataSection, texts: Iterable[str]) -> Tokenizer:
    try:
        return Tokenizer.train(texts, data.tokenizer.kind, data.tokenizer.vocab_size, data.tokenizer.lowercase)
    except ConfigError as error:
        raise ConfigError(f"data.tokenizer.{error}; raise it") from None


def _source_texts(rows: Sequence[Row]) -> Iterable[str]:
    for row in rows:
        yield row.input if isinstance(row.input, str) else " ".join(map(str, row.input or ()))


def _target_texts(rows: Sequence[Row]) -> Iterable[str]:
    return (text for row in rows for text in row.references)


def _facts(recipe: Recipe, rows: Sequence[Row]) -> Facts:
    """Of the rows of the training split."""
    size = _feature_size(rows)
    if recipe.makes_text:
        return Facts(feature_size=size)
    if recipe.problem_type != "regression":
        several = recipe.problem_type == "multi_label_classification"
        return Facts(labels=_labels(rows, least=1 if several else 2), feature_size=size)
    names = recipe.data.columns.targets if recipe.data.columns else ("value",)
    numbers = np.array([[float(number) for number in row.references] for row in rows])
    deviations = numbers.std(axis=0)
    for name, deviation, largest in zip(names, deviations, np.abs(numbers).max(axis=0), strict=True):
        if deviation <= SMALLEST_DEVIATION * largest:
            raise DataError(f"{name} is the same number in every row of the training split; there is nothing to learn")
    return Facts(0, 0, names, size, tuple(numbers.mean(axis=0).tolist()), tuple(deviations.tolist()))


def _labels(rows: Sequence[Row], least: int) -> tuple[str, ...]:
    """All labels, in order."""
    names = {name for row in rows for name in row.references}
    if len(names) < least:
        only = f"has the label {min(names)!r} only" if names else "has no label"
        raise DataError(f"the training split {only}; there is nothing to tell apart")
    return tuple(sorted(names, key=in_order))


def _feature_size(rows: Sequence[Row]) -> int:
    """Numbers in a step, the same in every one; 0 where inputs are of another kind."""
    first = rows[0].input
    return len(first[0]) if isinstance(first, tuple) and isinstance(first[0], tuple) else 0
