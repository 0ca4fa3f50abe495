"""Tokenizer over the library `tokenizers`.

Knows text and token ids; knows no model. Five kinds, all trained from data: `bpe` and `unigram` on bytes, `word` on
single spaces, `character`, `byte`. The byte-based ones round-trip every text; `word` and `character` round-trip what
they have seen, and write <unk> for the rest. To `word` the end of a line is a word, and spaces beside it are lost. A
word of the data that is spelt like a special token is no part of what `word` has seen: <unk>, as corpora with a fixed
vocabulary hold it, and <pad>, <bos> and <eos> are all unknown words.
"""

import codecs
import hashlib
import itertools
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

from seqmodels.errors import ConfigError, ModelDirectoryError

SPECIAL_TOKENS = ["<pad>", "<unk>", "<bos>", "<eos>"]
PAD, UNK, BOS, EOS = range(4)
# Byte-based pieces spell each byte by one character: one that can be seen by itself, another by one of those from 256.
_SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_UNSEEN = [byte for byte in range(0x100) if byte not in _SEEN]
BYTES = {chr(byte): byte for byte in _SEEN} | {chr(0x100 + i): byte for i, byte in enumerate(_UNSEEN)}

Kind = Literal["bpe", "unigram", "word", "character", "byte"]


class Tokenizer:
    """Text <-> token ids. The four special tokens have ids 0 to 3 and are never read out of a text."""

    def __init__(self, backend: tokenizers.Tokenizer, text: str | None = None) -> None:
        self._backend = backend
        # The JSON as first written: the library's floats change in the last digit when read and written again, and
        # its tables come in an order that changes from run to run.
        self._text = text or json.dumps(json.loads(backend.to_str()), ensure_ascii=False, sort_keys=True, indent=1)
        self._backend.encode_special_tokens = True  # a user who types "<eos>" means the five characters
        # Pieces spell a word's leading space; a text that begins with one lets its first word look like the same
        # word elsewhere. `decode` takes it away again.
        fields = json.loads(self._text)
        self._leading_space = fields["pre_tokenizer"].get("use_regex", False)
        self._holds_words = fields["decoder"] is None  # which are joined with spaces
        self._holds_bytes = not self._holds_words and fields["decoder"]["type"] == "ByteLevel"
        if self._holds_bytes and not self._leading_space:  # of kind "byte"
            # The library keeps the last ten thousand words that it has spelt. Here each text is one, of up to 256 bytes
            # and 40 times as much memory, and bytes need no remembering.
            self._backend.model._resize_cache(0)
        self._reads_lines = self._holds_words and fields["pre_tokenizer"]["type"] == "Sequence"  # since version 0.1.0

    @classmethod
    def train(
        cls, texts: Iterable[str], kind: Kind = "bpe", vocab_size: int = 8000, lowercase: bool = False
    ) -> "Tokenizer":
        """Learn a vocabulary. vocab_size is an upper limit that counts the special tokens and is unused by `byte`.

        The same texts give the same vocabulary, except for `unigram`, whose scores the library sums in any order.
        Raises ConfigError where vocab_size is too small for the kind.
        """
        backend = _untrained(kind)
        if lowercase:
            backend.normalizer = normalizers.Lowercase()
        if kind == "byte":
            return cls(backend)
        least = 260 if kind in ("bpe", "unigram") else 5
        if vocab_size < least:
            raise ConfigError(f"vocab_size is {vocab_size}, but a {kind} tokenizer needs at least {least}")
        if kind in ("bpe", "unigram"):
            texts = (" " + text for text in texts)  # as `encode` will see them
        elif kind == "word":
            texts = _without_special_words(texts, backend.normalizer)
        backend.train_from_iterator(texts, _trainer(kind, vocab_size))
        assert _first_tokens(backend) == SPECIAL_TOKENS, "a model would take words for its control tokens"
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> "Tokenizer":
        """Raises ModelDirectoryError where the file is missing, broken, or lacks the special tokens."""
        try:
            text = path.read_text(encoding="utf-8")
            backend = tokenizers.Tokenizer.from_str(text)
            loaded = cls(backend, text)
        except FileNotFoundError:
            raise ModelDirectoryError(f"{path.name} is missing from the model directory") from None
        except Exception:  # the library raises bare Exception for any malformed file
            raise ModelDirectoryError(
                f"{path.name} is not a tokenizer that the `tokenizers` library can read"
            ) from None
        found = _first_tokens(backend)
        if found != SPECIAL_TOKENS:
            raise ModelDirectoryError(f"{path.name}: tokens 0 to 3 are {found}, but must be {SPECIAL_TOKENS}")
        return loaded

    def save(self, path: Path) -> None:
        path.write_text(self._text, encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens. An empty text has none."""
        if not text:
            return []
        return _plain(self._backend.encode(self._spaced(text), add_special_tokens=False).ids)

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that stands in the middle of another, so that no space is implied before it."""
        return _plain(self._backend.encode(text, add_special_tokens=False).ids)

    def unknown(self, text: str) -> list[str]:
        """The words, or characters, that become <unk>, each once; of the byte-based kinds none do."""
        encoding = self._backend.encode(self._spaced(text), add_special_tokens=False)
        pieces = zip(_plain(encoding.ids), encoding.offsets, strict=True)
        return list(dict.fromkeys(text[start:end] for token_id, (start, end) in pieces if token_id == UNK))

    def encode_source(self, text: str) -> list[int]:
        """What a generator's encoder reads: the text and EOS, so that attention has a place for "all is said"."""
        return [*self.encode(text), EOS]

    def encode_words(self, words: Sequence[str]) -> tuple[list[int], list[int]]:
        """Ids of all words in order, and for each word the index of its last piece: where a tagger labels it.

        The last, not the first, because a one-directional model has read the whole word only there. A word without
        pieces is one <unk>.
        """
        ids: list[int] = []
        last: list[int] = []
        for encoding in self._backend.encode_batch([self._spaced(word) for word in words], add_special_tokens=False):
            ids += _plain(encoding.ids) or [UNK]
            last.append(len(ids) - 1)
        return ids, last

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out, and so are bytes that form no character."""
        text = str(self._backend.decode(list(ids), skip_special_tokens=True))
        if self._reads_lines:
            return re.sub(" ?\n ?", "\n", text)
        return text.removeprefix(" ") if self._leading_space else text

    def spans(self, text: str, inside: bool = False) -> list[tuple[int, int]]:
        """Where in a text each token stands that `encode` (inside: `encode_inside`) reads there. The tokens that spell
        a part of a character each stand where all of it does."""
        added = self._leading_space and not inside and text != ""
        encoding = self._backend.encode(" " + text if added else text, add_special_tokens=False)
        return [(max(0, start - added), end - added) for start, end in encoding.offsets]

    def starts(self, ids: Sequence[int]) -> list[int]:
        """How many characters of `decode(ids)` stand before each token: all that the tokens before it have completed,
        so that those that spell one character together begin where it does."""
        texts = list(self._texts(ids))
        written = [0, *itertools.accumulate(map(len, texts))]
        removed = self._leading_space and "".join(texts).startswith(" ")
        return [max(0, count - removed) for count in written[:-1]]

    def _texts(self, ids: Sequence[int]) -> Iterator[str]:
        """What each token adds to the text: one that only begins a character nothing, the one that ends it all of it.
        Special tokens add nothing."""
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        before = "\n"
        for token_id in ids:
            piece = "" if token_id <= EOS else self.token(token_id)
            if self._holds_bytes:
                yield characters.decode(_bytes(piece))
            elif piece and self._holds_words and before != "\n" and not (self._reads_lines and piece == "\n"):
                yield " " + piece
            else:
                yield piece
            before = piece or before

    def words(self, ids: Sequence[int]) -> list[str] | None:
        """What the text of token ids is cut into before its pieces are looked for, spelt as the vocabulary spells it.
        None where it ends, or begins, within a character. Of the byte-based kinds."""
        text = str(self._backend.decode(list(ids), skip_special_tokens=True))
        if "\N{REPLACEMENT CHARACTER}" in text:
            return None
        return [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(text)]

    def merges(self) -> dict[tuple[str, str], int]:
        """Which neighbours may become one piece, each with its rank: the least is made first. Of kind `bpe`."""
        pairs = json.loads(self._text)["model"]["merges"]
        return {(first, second): rank for rank, (first, second) in enumerate(pairs)}

    def ids(self) -> dict[str, int]:
        """Each piece, as the vocabulary spells it, with its token id."""
        return dict(self._backend.get_vocab())

    def token(self, token_id: int) -> str:
        """The piece as the vocabulary spells it."""
        return str(self._backend.id_to_token(token_id))

    def word_edges(self) -> tuple[list[bool], list[bool]]:
        """For each token: whether its text begins within a word, and whether it ends within one, so that neighbours
        may join. What writes nothing, such as <unk>, and a part of a character count as letters; EOS ends a word."""
        if self._holds_words:
            return [False] * self.vocab_size, [False] * self.vocab_size
        texts = [str(self._backend.decode([i], skip_special_tokens=True)) for i in range(self.vocab_size)]
        return [_within_word(text[:1], i) for i, text in enumerate(texts)], [
            _within_word(text[-1:], i) for i, text in enumerate(texts)
        ]

    @property
    def vocab_size(self) -> int:
        return int(self._backend.get_vocab_size())

    @property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer's JSON."""
        return hashlib.sha256(self._text.encode()).hexdigest()

    def _spaced(self, text: str) -> str:
        return " " + text if self._leading_space else text


def _bytes(piece: str) -> bytes:
    """What a byte-based piece spells; of one that somebody added by hand, its own characters."""
    return bytes(BYTES[c] for c in piece) if all(c in BYTES for c in piece) else piece.encode()


def _without_special_words(texts: Iterable[str], normalizer: normalizers.Normalizer | None) -> Iterator[str]:
    """Texts for the library's word trainer, which gives a word that is spelt like a special token an id of its own,
    and leaves the special one without any."""
    for text in texts:
        words = (normalizer.normalize_str(text) if normalizer else text).replace("\n", " \n ").split(" ")
        yield " ".join(word for word in words if word not in SPECIAL_TOKENS)


def _first_tokens(backend: tokenizers.Tokenizer) -> list[str | None]:
    return [backend.id_to_token(i) for i in range(len(SPECIAL_TOKENS))]


def _within_word(character: str, token_id: int) -> bool:
    """Whether the first or last character of a token's text is of a word, combining marks included."""
    if not character:
        return token_id != EOS
    return character.isalnum() or character in "_\N{REPLACEMENT CHARACTER}" or unicodedata.category(character)[0] == "M"


def _plain(ids: Sequence[int]) -> list[int]:
    """A word-level vocabulary finds "<eos>" in a text where a user typed it: that is an unknown word, no end."""
    return [UNK if token_id <= EOS else token_id for token_id in ids]


def _untrained(kind: Kind) -> tokenizers.Tokenizer:
    if kind == "byte":
        pieces = SPECIAL_TOKENS + sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = tokenizers.Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, []))
        backend.add_special_tokens(SPECIAL_TOKENS)
    elif kind == "bpe":
        backend = tokenizers.Tokenizer(models.BPE())
    elif kind == "unigram":
        backend = tokenizers.Tokenizer(models.Unigram())
    else:
        backend = tokenizers.Tokenizer(models.WordLevel(unk_token=SPECIAL_TOKENS[UNK]))
    if kind == "word":
        lines = pre_tokenizers.Split("\n", "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([lines, pre_tokenizers.Split(" ", "removed")])
    elif kind == "character":
        backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        backend.decoder = decoders.Fuse()
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "byte")
        backend.decoder = decoders.ByteLevel()
    return backend


def _trainer(kind: Kind, vocab_size: int) -> trainers.Trainer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "bpe":
        return trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, initial_alphabet=alphabet, show_progress=False
        )
    if kind == "unigram":
        return trainers.UnigramTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=alphabet,
            unk_token=SPECIAL_TOKENS[UNK],
            show_progress=False,
        )
    return trainers.WordLevelTrainer(vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False)
