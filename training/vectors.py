"""Word vectors that others have trained, such as GloVe's or word2vec's, as the embeddings that a model begins with.

A text file with a word and its numbers in each line, spaces or tabs between; a first line `count size` is word2vec's.
"""

import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from seqmodels.errors import ConfigError, DataError
from seqmodels.tokenizer import Tokenizer
from training.config import DataSection
from training.data.examples import Codec

SEPARATORS = re.compile(r"[ \t]+")  # not all white space: some words hold a no-break space
BYTE_ORDER_MARK = "\ufeff"  # some editors write one before the first word
LARGEST = torch.finfo(torch.float32).max


def check_files(data: DataSection) -> None:
    """Raises DataError for a file that is not there, before anything that takes time."""
    for field in ("input_vectors", "target_vectors"):
        name = getattr(data, field)
        if name is not None and not Path(name).is_file():
            raise DataError(f"data.{field} is {name!r}, which is no file; name a text file of word vectors")


def read_vectors(data: DataSection, codec: Codec, say: Callable[[str], None]) -> dict[str, Tensor]:
    """By the name of the parameter that begins with them: (V, E), NaN where the file lacks the word as the vocabulary
    spells it. Numbers stay as the file gives them. say: is told how many words were found.

    Raises ConfigError where vectors are of another size than the model's, DataError for a file that cannot be used.
    """
    vectors = {}
    for part, field, tokenizer in (
        ("encoder", "input_vectors", codec.source_tokenizer),
        ("decoder", "target_vectors", codec.target_tokenizer),
    ):
        if (name := getattr(data, field)) is None:
            continue
        assert tokenizer is not None, "a recipe without text there is refused"
        size = getattr(codec.config, part).embedding_size
        try:
            found = _find(Path(name), tokenizer, size)
        except _SizeError as error:
            raise ConfigError(
                f"data.{field} {name} holds vectors of {error} numbers, but model.{part}.embedding_size is {size}; "
                f"set it to {error}"
            ) from None
        except OSError as error:
            raise DataError(
                f"data.{field} {name} cannot be read: {error.strerror or error}; name a text file of word vectors"
            ) from None
        except DataError as error:
            raise DataError(f"data.{field} {name}: {error}") from None
        count = int((~found.isnan()).all(1).sum())
        say(f"data.{field}: {count} of {len(found)} words of the vocabulary begin with the vectors of {name}")
        vectors[f"{part}.embedding.weight"] = found
    return vectors


class _SizeError(Exception):
    """A file's vectors are of the given size, not of the one that was asked for."""


def _find(path: Path, tokenizer: Tokenizer, size: int) -> Tensor:
    """The vectors of the vocabulary's words. Of a word that has several lines, the first counts."""
    rows = {tokenizer.token(row): row for row in range(tokenizer.vocab_size)}
    found = torch.full((tokenizer.vocab_size, size), math.nan)
    promised, count = None, 0
    for number, (word, *fields) in _lines(path):
        if number == 1:
            header = len(fields) == 1 and word.isdecimal() and fields[0].isdecimal()
            there = int(fields[0]) if header else size if _holds(fields, size) else len(fields)
            if not there:
                raise DataError("line 1 holds no numbers; each line must hold a word and its numbers")
            if there != size:
                raise _SizeError(there)
            if header:
                promised = int(word)
                continue
        count += 1
        if not _holds(fields, size):
            raise DataError(f"line {number} holds {len(fields)} numbers, but line 1 says {size}; mend or remove it")
        if len(fields) == size and word in rows:  # a word that holds spaces is in no vocabulary
            found[rows.pop(word)] = _vector(fields, number)
    if promised not in (None, count):
        raise DataError(f"line 1 promises {promised} words, but {count} follow; fetch the file again")
    if found.isnan().all():
        raise DataError("none of the vocabulary's words is in it; name a file of the same language and case")
    return found


def _holds(fields: list[str], size: int) -> bool:
    """Whether so many numbers end the line, or may be meant to; what stands before them is of a word with spaces."""
    return len(fields) == size or (len(fields) > size and not _is_number(fields[-size - 1]))


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The number of each line, and what stands between its separators. Some words hold what `splitlines` splits at."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8").rstrip(" \t\r\n")
                text = text.removeprefix(BYTE_ORDER_MARK) if number == 1 else text
                # A regular expression takes seven times as long, and files have millions of lines.
                plain = "\t" not in text and "  " not in text
                yield number, text.split(" ") if plain else SEPARATORS.split(text)
            except UnicodeDecodeError as error:
                byte = line[error.start]
                raise DataError(
                    f"line {number} is not UTF-8 (byte {byte:#04x}); write the file as text in UTF-8 first"
                ) from None
    if not path.stat().st_size:
        raise DataError("the file is empty; each line must hold a word and its numbers")


def _vector(fields: list[str], number: int) -> Tensor:
    for field in fields:
        if not _is_number(field):
            raise DataError(f"line {number} holds {field!r} where a number must stand; mend or remove it")
    return torch.tensor([float(field) for field in fields])


def _is_number(text: str) -> bool:
    """One that a weight can be."""
    try:
        return abs(float(text)) <= LARGEST
    except ValueError:
        return False
