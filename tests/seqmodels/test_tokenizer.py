"""Tokenizers round-trip text, and never read a special token out of it."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqmodels.errors import ConfigError, ModelDirectoryError
from seqmodels.tokenizer import BOS, EOS, PAD, UNK, Kind, Tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = [
    "A dog runs over the street.",
    "Ein Hund läuft über die Straße.",
    "日本語 🙂 and\nnew lines",
    "two  spaces",
] * 5
KINDS: tuple[Kind, ...] = ("bpe", "unigram", "word", "character", "byte")
TOKENIZERS = {kind: Tokenizer.train(TEXTS, kind, vocab_size=400) for kind in KINDS}
texts = st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte"])
@given(text=texts)
@settings(max_examples=200, deadline=None)
def test_byte_based_kinds_round_trip_every_text(kind: Kind, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not {PAD, UNK, BOS, EOS} & set(ids)


def test_bytes_are_not_kept() -> None:
    """Each text would be a word of its own in the library's cache: 100 MB of a server's memory."""
    script = """
import random
from pathlib import Path
from seqmodels.tokenizer import Tokenizer
tokenizer, chance = Tokenizer.train([], "byte"), random.Random(0)
held = lambda: int(Path("/proc/self/statm").read_text().split()[1])
before = held()
for _ in range(6000):
    tokenizer.encode("".join(chance.choices("abcdefgh", k=200)))
assert held() - before < 2500, f"{held() - before} pages more"  # of 4 kB
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


@pytest.mark.parametrize("kind", KINDS)
def test_seen_text_round_trips(kind: Kind) -> None:
    tokenizer = TOKENIZERS[kind]
    for text in TEXTS[:3]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("") == []
    assert tokenizer.decode([BOS, *tokenizer.encode(TEXTS[0]), EOS, PAD]) == TEXTS[0]


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_are_text(kind: Kind) -> None:
    ids = TOKENIZERS[kind].encode("<eos> <pad> <bos>")
    assert not {PAD, BOS, EOS} & set(ids)


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_the_training_data_keep_their_ids(kind: Kind, lowercase: bool, tmp_path: Path) -> None:
    """The Penn Treebank spells its rare words <unk>."""
    corpus = ["the <unk> of <unk> <UNK>", "<pad> a <eos> b", "<bos> the"] * 3
    tokenizer = Tokenizer.train(corpus, kind, 400, lowercase)
    assert [tokenizer.token(i) for i in range(4)] == ["<pad>", "<unk>", "<bos>", "<eos>"]
    assert tokenizer.vocab_size == len({tokenizer.token(i) for i in range(tokenizer.vocab_size)})
    ids = tokenizer.encode("the <unk> of <pad> <bos> <eos>")
    assert not {PAD, BOS, EOS} & set(ids)
    if kind == "word":
        the, of = tokenizer.encode("the of")
        assert ids == [the, UNK, of, UNK, UNK, UNK] and UNK not in (the, of)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("the <unk>") == tokenizer.encode("the <unk>")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_where_a_written_token_starts_is_all_that_is_written_before_it(kind: Kind, data: st.DataObject) -> None:
    """Any tokens in any order, as a model that has learned nothing writes them."""
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=12)) + tokenizer.encode("dog 日\n")
    text, starts = tokenizer.decode(ids), tokenizer.starts(ids)
    assert len(starts) == len(ids)
    for i, start in enumerate(starts):
        before = tokenizer.decode(ids[:i])
        assert text.startswith(before[:start]) and set(before[start:]) <= {"\N{REPLACEMENT CHARACTER}"}


@pytest.mark.parametrize("kind", ["bpe", "unigram", "byte", "character"])
def test_characters_in_parts_start_where_they_do(kind: Kind) -> None:
    tokenizer = TOKENIZERS[kind]
    text = TEXTS[2]
    ids = tokenizer.encode(text)
    starts = tokenizer.starts(ids)
    assert starts == [start for start, _ in tokenizer.spans(text)]
    for number, character in enumerate(text):
        if kind == "byte":
            assert starts.count(number) == len(character.encode())
        if kind == "character":
            assert starts[number] == number


def test_where_tokens_are_read() -> None:
    tokenizer = TOKENIZERS["word"]
    assert tokenizer.spans("  A  dog\nflies") == [(2, 3), (5, 8), (8, 9), (9, 14)]
    assert TOKENIZERS["bpe"].spans("A dog")[0][0] == 0  # and not before the text, where `encode` puts a space
    for kind in KINDS:
        for text in (*TEXTS[:4], "", "unseen Ωmega"):
            assert len(TOKENIZERS[kind].spans(text)) == len(TOKENIZERS[kind].encode(text))
            assert len(TOKENIZERS[kind].spans(text, inside=True)) == len(TOKENIZERS[kind].encode_inside(text))


@pytest.mark.parametrize("kind", KINDS)
def test_words_are_labelled_at_their_last_piece(kind: Kind) -> None:
    tokenizer = TOKENIZERS[kind]
    words = ["A", "dog", "läuft", "Unseen", "over"]
    ids, last = tokenizer.encode_words(words)
    assert len(last) == len(words)
    assert last == sorted(set(last))
    assert last[-1] == len(ids) - 1
    pieces = [ids[start + 1 : end + 1] for start, end in zip([-1, *last], last, strict=False)]
    assert pieces == [tokenizer.encode(word) for word in words]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(kind: Kind, tmp_path: Path) -> None:
    tokenizer = TOKENIZERS[kind]
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.fingerprint == tokenizer.fingerprint
    for text in [*TEXTS[:4], "unseen Ωmega"]:
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.encode_words(text.split()) == tokenizer.encode_words(text.split())


def test_the_end_of_a_line_is_a_word_and_glues_none() -> None:
    text = "the end\nof a line \n of\n\nthe <unk>\nend"
    tokenizer = Tokenizer.train([text], "word")
    found = [tokenizer.token(i) for i in range(4, tokenizer.vocab_size)]
    assert sorted(found) == ["\n", "a", "end", "line", "of", "the"]
    assert tokenizer.decode(tokenizer.encode(text)) == "the end\nof a line\nof\n\nthe\nend"
    ids = tokenizer.encode("the\nend\n")
    written = [tokenizer.decode(ids[:length]) for length in range(len(ids) + 1)]
    assert written == ["", "the", "the\n", "the\nend", "the\nend\n"], "each begins with the one before: it is streamed"


def test_lowercase_is_part_of_the_tokenizer() -> None:
    tokenizer = Tokenizer.train(TEXTS, "bpe", vocab_size=300, lowercase=True)
    assert tokenizer.decode(tokenizer.encode("A DOG")) == "a dog"


def test_a_word_looks_the_same_at_the_start_of_a_text() -> None:
    tokenizer = Tokenizer.train(["Two dogs and Two cats", "Two more"] * 10, "bpe", vocab_size=300)
    (first, *_), (_, later) = tokenizer.encode("Two"), tokenizer.encode("and Two")
    assert first == later


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size is 100, but a bpe tokenizer needs at least 260"):
        Tokenizer.train(TEXTS, "bpe", vocab_size=100)
    with pytest.raises(ModelDirectoryError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelDirectoryError, match=r"tokenizer\.json is not a tokenizer"):
        Tokenizer.load(tmp_path / "tokenizer.json")


@pytest.mark.parametrize(
    ("kind", "joins"), [("bpe", "||"), ("word", "||"), ("character", "++||+++||++++"), ("byte", "++||+++||+++++")]
)
def test_word_edges_say_where_words_join(kind: Kind, joins: str) -> None:
    """+ where two neighbouring tokens are of one word, | where a space or a point stands between."""
    tokenizer = TOKENIZERS[kind]
    continues, is_open = tokenizer.word_edges()
    ids = tokenizer.encode("Ein Hund läuft")
    assert "".join("+" if is_open[a] and continues[b] else "|" for a, b in pairwise(ids)) == joins
    assert not continues[EOS] and not is_open[EOS]
    assert kind == "word" or (all(continues[:EOS]) and all(is_open[:EOS]))  # they write nothing, so a word goes on
