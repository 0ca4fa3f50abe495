"""Generated data: right by hand-written cases, the same from the same seed, splits that share nothing."""

import io
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image

from seqmodels.rendering import bio_spans, is_bio
from training.baselines import bag_of_words, single_frame
from training.data.generated import DATA_SETS, generate
from training.data.generated.frames import MOVES, SIZE
from training.data.generated.numbers import english, french
from training.data.generated.pictures import COLOURS, png
from training.data.rows import Row, fingerprint


@pytest.mark.parametrize("name", DATA_SETS)
def test_splits_share_no_item_and_depend_on_the_seed_alone(name: str) -> None:
    made = generate(name)
    keys = [row.target if row.input is None else row.input for rows in made.values() for row in rows]
    assert len(set(keys)) == len(keys)
    assert list(made) == ["train", "validation", "test"]
    small = DATA_SETS[name](5, (30, 10, 10))
    assert fingerprint(dict(small)) == fingerprint(dict(DATA_SETS[name](5, (30, 10, 10))))
    assert fingerprint(dict(small)) != fingerprint(dict(DATA_SETS[name](6, (30, 10, 10))))


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "un"),
        (16, "seize"),
        (17, "dix-sept"),
        (21, "vingt et un"),
        (22, "vingt-deux"),
        (60, "soixante"),
        (61, "soixante et un"),
        (70, "soixante-dix"),
        (71, "soixante et onze"),
        (72, "soixante-douze"),
        (80, "quatre-vingts"),
        (81, "quatre-vingt-un"),
        (90, "quatre-vingt-dix"),
        (91, "quatre-vingt-onze"),
        (99, "quatre-vingt-dix-neuf"),
        (100, "cent"),
        (101, "cent un"),
        (180, "cent quatre-vingts"),
        (200, "deux cents"),
        (201, "deux cent un"),
        (1000, "mille"),
        (1001, "mille un"),
        (2000, "deux mille"),
        (21_000, "vingt et un mille"),
        (80_000, "quatre-vingt mille"),
        (80_080, "quatre-vingt mille quatre-vingts"),
        (200_000, "deux cent mille"),
        (200_200, "deux cent mille deux cents"),
        (371_281, "trois cent soixante et onze mille deux cent quatre-vingt-un"),
        (999_999, "neuf cent quatre-vingt-dix-neuf mille neuf cent quatre-vingt-dix-neuf"),
    ],
)
def test_french_number_words(number: int, words: str) -> None:
    assert french(number) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (105, "one hundred and five"),
        (1_005, "one thousand and five"),
        (12_345, "twelve thousand three hundred and forty-five"),
        (300_000, "three hundred thousand"),
    ],
)
def test_english_number_words(number: int, words: str) -> None:
    assert english(number) == words


def test_every_number_has_its_own_words() -> None:
    assert len({french(n) for n in range(1, 1_000_000)}) == 999_999
    assert len({english(n) for n in range(1, 1_000_000, 7)}) == len(range(1, 1_000_000, 7))


def test_a_bag_of_words_cannot_tell_the_sentiment() -> None:
    made = generate("sentiment")
    labels = [row.target for row in made["test"]]
    assert 0.4 < labels.count("positive") / len(labels) < 0.6
    assert bag_of_words(made["train"][:2000], made["test"]) <= 0.75


def test_the_bag_of_words_baseline_learns_where_words_suffice() -> None:
    rows = generate("sentiment")["train"][:400]
    easy = [type(row)(f"{row.target} review", row.target) for row in rows]
    assert bag_of_words(easy[:300], easy[300:]) == 1.0


@pytest.mark.parametrize("name", ["frames", "clips"])
def test_one_frame_does_not_show_a_move(name: str) -> None:
    made = generate(name)
    assert single_frame(made["train"][:200], made["test"][:100]) < 0.35


@pytest.mark.parametrize("per_frame", [False, True])
def test_the_single_frame_baseline_learns_where_one_frame_suffices(per_frame: bool) -> None:
    """Each frame shows its colour."""
    colours = [(row.input or (), row.references[0].split()[1]) for row in generate("clip-captions")["train"][:400]]
    easy = [Row(frames, (colour,) * len(frames) if per_frame else colour) for frames, colour in colours]
    assert single_frame(easy[:300], easy[300:]) > 0.97


def test_baselines_learn_from_rows_that_stand_label_by_label() -> None:
    """As many published data sets do; and frames may be of any size."""
    sizes = {"red": 9, "green": 12, "blue": 50}
    rows = [
        Row((png(Image.new("RGB", (sizes[colour], 8), (*shade, number))),), colour)
        for colour, shade in (("red", (200, 0)), ("green", (0, 200)), ("blue", (0, 0)))
        for number in range(40)
    ]
    assert single_frame(rows, rows[::3]) == 1.0
    texts = [Row(f"a {row.target} review {number}", row.target) for number, row in enumerate(rows)]
    assert bag_of_words(texts, texts[::3]) == 1.0


def test_frames_move_as_their_labels_say() -> None:
    for row in generate("frames")["test"][:20]:
        assert _moves(row) == list(row.target[1:])


@pytest.mark.parametrize("name", ["clips", "clip-captions"])
def test_clips_move_as_they_are_described(name: str) -> None:
    for row in generate(name)["test"][:50]:
        legs = [move for move, _ in itertools.groupby(_moves(row))]
        (text,) = row.references
        described = " then ".join(legs)
        if name == "clip-captions":
            colour, shape = text.split()[1:3]
            described = f"a {colour} {shape} moves {described}"
            assert _colour(row) == COLOURS[colour] and shape in ("square", "circle")
        assert text == described


def _moves(row: Row) -> list[str]:
    """What led from each frame to the next."""
    moves = []
    for before, after in itertools.pairwise(_middle(frame) for frame in row.input or ()):
        moved = tuple((a - b + SIZE // 2) % SIZE - SIZE // 2 for a, b in zip(after, before, strict=True))
        moves.append(next(name for name, step in MOVES.items() if step == moved))
    return moves


def _colour(row: Row) -> object:
    """The one beside black."""
    assert isinstance(row.input, tuple) and isinstance(row.input[0], bytes)
    _, (_, colour) = sorted(Image.open(io.BytesIO(row.input[0])).getcolors() or (), reverse=True)
    return colour


def _middle(frame: object) -> tuple[int, int]:
    """Where the one shape stands in a world that wraps round: the angle of the mean on each axis."""
    assert isinstance(frame, bytes)
    lit = np.asarray(Image.open(io.BytesIO(frame))).sum(2) > 0
    turns = np.exp(2j * np.pi * np.arange(SIZE) / SIZE)
    angles = [np.angle((lit.sum(axis) * turns).sum()) for axis in (0, 1)]
    x, y = (round(float(angle) / (2 * np.pi) * SIZE) % SIZE for angle in angles)
    return x, y


def test_number_tags_are_bio_and_cover_the_numbers() -> None:
    rows = generate("number-tags")["test"]
    assert is_bio(sorted({tag for row in rows for tag in row.target}))
    for row in rows:
        assert isinstance(row.input, tuple)
        inside = {number for _, first, end in bio_spans(row.target) for number in range(first, end)}
        for number, word in enumerate(row.input):
            assert (number in inside) == (_is_number(row.input, number)), (row, word)


def _is_number(words: Sequence[object], place: int) -> bool:
    numerals = {word for n in range(1, 100) for word in english(n).split("-")} | {"hundred", "thousand"}
    word = str(words[place])
    return word.isdigit() or (word in numerals and not (word == "one" and words[place - 1] == "no"))


def test_sums_and_copies_are_right() -> None:
    for row in generate("adding", seed=4)["test"][:50]:
        assert isinstance(row.input, tuple) and len(row.input) == 600
        marked = [place for place, (_, mark) in enumerate(row.input) if mark]
        assert len(marked) == 2 and marked[0] < 300 <= marked[1]
        assert float(row.references[0]) == pytest.approx(sum(row.input[place][0] for place in marked))
    for row in generate("copy", seed=4)["test"][:50]:
        assert isinstance(row.input, tuple) and len(row.input) == len(row.references) == 220
        assert row.references[210:] == row.input[:10] and set(row.references[:210]) == {"-"}
        assert row.input[209] == "now" and set(row.input[10:209]) | set(row.input[210:]) == {"-"}
