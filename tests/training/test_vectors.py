"""Word vectors as initial embeddings: which rows they fill, what is refused, and that going on does not read them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from seqmodels.errors import ConfigError, DataError
from seqmodels.pretrained import load_pretrained
from tests.training.recipes import CLASSIFIER, LANGUAGE_MODEL, TEXT_ENCODER, TRANSLATOR, WORDS, fields, recipe
from training import initial, vectors
from training.__main__ import main
from training.loop import Trainer
from training.parsing import parse_recipe
from training.run import train

SIZE = 16  # of the embeddings in tests.training.recipes
ONE = " ".join(["0.5"] * SIZE)


def spelt(*numbers: float) -> str:
    return " ".join(map(str, numbers))


def write(path: Path, words: list[str], first: str = "") -> dict[str, torch.Tensor]:
    """A file of random vectors, with a line for each word."""
    numbers = {word: torch.randn(SIZE, generator=torch.Generator().manual_seed(n)) for n, word in enumerate(words)}
    lines = [f"{word} {spelt(*numbers[word].tolist())}" for word in words]
    path.write_text("\n".join([*([first] if first else []), *lines]) + "\n", encoding="utf-8")
    return numbers


def begun(monkeypatch: pytest.MonkeyPatch, task: str, directory: Path, **sections: Any) -> dict[str, torch.Tensor]:
    """The weights before step 0."""
    seen: dict[str, torch.Tensor] = {}

    def run(trainer: Trainer) -> Path:
        seen.update({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run", run)
        with pytest.raises(KeyboardInterrupt):
            train(recipe(task, directory, **sections))
    return seen


@pytest.mark.parametrize("first", ["", f"4 {SIZE}"], ids=["glove", "word2vec"])
def test_words_that_the_file_has_begin_with_its_vectors_and_others_at_random(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], first: str
) -> None:
    given = write(tmp_path / "vectors.txt", ["film", "in-no-vocabulary", "dull", "<unk>"], first)
    data = {"generated": "sentiment", "tokenizer": WORDS}
    plain = begun(monkeypatch, "classify", tmp_path / "plain", data=data)
    path = str(tmp_path / "vectors.txt")
    filled = begun(monkeypatch, "classify", tmp_path / "filled", data={**data, "input_vectors": path})
    tokenizer = vectors.Tokenizer.load(tmp_path / "filled" / "tokenizer.json")
    words = [tokenizer.token(row) for row in range(tokenizer.vocab_size)]
    assert {"film", "dull", "<unk>"} <= set(words)
    name = "encoder.embedding.weight"
    for row, word in enumerate(words):
        expected = given[word] if word in given else plain[name][row]
        assert torch.equal(filled[name][row], expected), word
    assert all(torch.equal(filled[other], plain[other]) for other in plain if other != name)
    assert f"data.input_vectors: 3 of {len(words)} words of the vocabulary" in capsys.readouterr().out


def test_a_translators_two_sides_and_a_language_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    english, french = write(tmp_path / "en.txt", ["seven"]), write(tmp_path / "fr.txt", ["x", "sept"])
    data = {"generated": "numbers-en-fr", "tokenizer": WORDS}
    named = {"input_vectors": str(tmp_path / "en.txt"), "target_vectors": str(tmp_path / "fr.txt")}
    weights = begun(monkeypatch, "translate", tmp_path / "both", data={**data, **named}, model=TRANSLATOR)
    for side, part, vector in (("source", "encoder", english["seven"]), ("target", "decoder", french["sept"])):
        tokenizer = vectors.Tokenizer.load(tmp_path / "both" / f"{side}_tokenizer.json")
        (row,) = tokenizer.encode("seven" if part == "encoder" else "sept")
        assert torch.equal(weights[f"{part}.embedding.weight"][row], vector)
    write(tmp_path / "words.txt", ["a", "doctor"])
    data = {"generated": "language-model", "tokenizer": WORDS, "target_vectors": str(tmp_path / "words.txt")}
    weights = begun(monkeypatch, "generate", tmp_path / "lm", data=data, model=LANGUAGE_MODEL)
    (row,) = vectors.Tokenizer.load(tmp_path / "lm" / "tokenizer.json").encode("doctor")
    assert torch.equal(weights["decoder.embedding.weight"][row], torch.randn(SIZE, generator=_seeded(1)))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_words_are_looked_up_as_the_vocabulary_spells_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "\n".join(f"Good film {n},yes\nBad film {n},no" for n in range(20))
    (tmp_path / "rows.csv").write_text(f"text,label\n{rows}\n", encoding="utf-8")
    given = write(tmp_path / "vectors.txt", ["Good", "bad"])
    for lowercase, word in ((False, "Good"), (True, "bad")):
        data = {
            "path": str(tmp_path / "rows.csv"),
            "columns": {"input": "text", "target": "label"},
            "cut": {"validation": 4},
            "tokenizer": {"kind": "word", "lowercase": lowercase},
            "input_vectors": str(tmp_path / "vectors.txt"),
        }
        weights = begun(monkeypatch, "classify", tmp_path / word, data=data)["encoder.embedding.weight"]
        held = [any(torch.equal(row, given[other]) for row in weights) for other in ("Good", "bad")]
        assert held == [word == "Good", word == "bad"]


def test_a_run_goes_on_without_the_file_also_before_its_first_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "vectors.txt", ["film", "dull"])
    data = {"generated": "sentiment", "tokenizer": WORDS, "input_vectors": str(tmp_path / "vectors.txt")}
    run = {"max_steps": 4, "max_eval_samples": 4, "ema_decay": 0.5}
    train(recipe(directory=tmp_path / "whole", data=data, run=run))
    begun(monkeypatch, "classify", tmp_path / "stopped", data=data, run=run)
    (tmp_path / "vectors.txt").unlink()
    train(recipe(directory=tmp_path / "stopped", data=data, run=run))
    assert load_pretrained(tmp_path / "whole").revision == load_pretrained(tmp_path / "stopped").revision


def test_what_an_attempt_without_a_run_left_is_not_used(tmp_path: Path) -> None:
    initial.keep_begin({"encoder.embedding.weight": torch.ones(2, 2)}, tmp_path)
    train(recipe(directory=tmp_path, run={"max_eval_samples": 4}))
    assert not (tmp_path / initial.BEGIN).exists()


@pytest.mark.parametrize(
    "text",
    [
        "\ufefffilm {film}\ndull {dull}\n",
        "\ufeff2 {size}\nfilm {film}\ndull {dull}\n",
        "film  {film} \t\r\ndull\t{tabs}\n",
        "a good film {film}\nfilm {film}\ndull {dull}\n",
        "film {film}\nno\xa0word {film}\n\xa0 {film}\n\t{film}\ndull {dull}\n",
    ],
    ids=[
        "byte order mark",
        "the same before a header",
        "double spaces and tabs",
        "a word with spaces first",
        "no-break",
    ],
)
def test_ways_of_writing_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    numbers = {word: spelt(*(n + place / 8 for place in range(SIZE))) for n, word in enumerate(("film", "dull"))}
    text = text.format(**numbers, tabs=numbers["dull"].replace(" ", "\t \t"), size=SIZE)
    (tmp_path / "vectors.txt").write_text(text, encoding="utf-8", newline="")
    data = {"generated": "sentiment", "tokenizer": WORDS, "input_vectors": str(tmp_path / "vectors.txt")}
    weights = begun(monkeypatch, "classify", tmp_path / "run", data=data)["encoder.embedding.weight"]
    tokenizer = vectors.Tokenizer.load(tmp_path / "run" / "tokenizer.json")
    for word, given in numbers.items():
        (row,) = tokenizer.encode(word)
        assert weights[row].tolist() == [float(number) for number in given.split()]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["is empty"]),
        ("film\n", ["line 1 holds no numbers"]),
        ("film 1 2 3\n", ["vectors of 3 numbers", "model.encoder.embedding_size is 16", "set it to 3"]),
        ("7 3\nfilm 1 2 3\n", ["vectors of 3 numbers", "is 16"]),
        (f"nowhere {ONE}\n", ["none of the vocabulary's words"]),
        (f"film {ONE}\ndull 0.5 0.5\n", ["line 2 holds 2 numbers", "says 16"]),
        (f"film {ONE}\n\ndull {ONE}\n", ["line 2 holds 0 numbers"]),
        (f"film {ONE}\ndull 0.5 {ONE}\n", ["line 2 holds 17 numbers"]),
        (f"film {ONE}\ndull {ONE[4:]} five\n", ["line 2 holds 'five'"]),
        (f"film {ONE}\ndull {ONE[4:]} nan\n", ["line 2 holds 'nan'"]),
        (f"film {ONE}\ndull {ONE[4:]} 1e39\n", ["line 2 holds '1e39'"]),
        (f"3 {SIZE}\nfilm {ONE}\ndull {ONE}\n", ["promises 3 words, but 2 follow"]),
        (f"film {ONE}\nd\xfcll {ONE}\n".encode("latin-1"), ["line 2 is not UTF-8 (byte 0xfc)"]),
        (None, ["is no file", "name a text file of word vectors"]),
    ],
)
def test_a_broken_file_is_refused_in_one_line_that_names_the_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes | None, words: list[str]
) -> None:
    path = tmp_path / "vectors.txt"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    data = {"generated": "sentiment", "tokenizer": WORDS, "input_vectors": str(path)}
    with pytest.raises((ConfigError, DataError)) as error:
        train(recipe(directory=tmp_path / "run", data=data))
    assert all(word in str(error.value) for word in ["data.input_vectors", str(path), *words]), str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "run.json").exists()  # so that the directory serves a mended file or recipe


def test_a_word_that_holds_spaces_is_passed_over_and_the_first_line_of_a_word_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As there are some in the largest of GloVe's files."""
    other = ONE.replace("5", "7")
    (tmp_path / "vectors.txt").write_text(f"film {ONE}\nfilm film {other}\nfilm {other}\n", encoding="utf-8")
    data = {"generated": "sentiment", "tokenizer": WORDS, "input_vectors": str(tmp_path / "vectors.txt")}
    weights = begun(monkeypatch, "classify", tmp_path / "run", data=data)["encoder.embedding.weight"]
    assert (weights == 0.5).all(1).sum() == 1 and not (weights == 0.7).any()


@pytest.mark.parametrize(
    ("task", "sections", "words"),
    [
        ("classify", {"data": {"tokenizer": {"kind": "bpe"}, "input_vectors": "x"}}, ["data.tokenizer.kind is 'bpe'"]),
        ("classify", {"data": {"tokenizer": WORDS, "target_vectors": "x"}}, ["data.target_vectors", "writes no text"]),
        (
            "generate",
            {"data": {"tokenizer": WORDS, "input_vectors": "x"}, "model": LANGUAGE_MODEL},
            ["data.input_vectors is 'x'", "reads no text"],
        ),
    ],
)
def test_vectors_that_could_do_nothing_are_refused(task: str, sections: dict[str, Any], words: list[str]) -> None:
    sections["data"]["generated"] = "language-model" if task == "generate" else "sentiment"
    with pytest.raises(ConfigError) as error:
        parse_recipe(fields(task, **sections))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_saved_models_embeddings_are_its_own(tmp_path: Path) -> None:
    train(recipe(directory=tmp_path / "first", run={"max_eval_samples": 4}))
    data = {"generated": "sentiment", "input_vectors": "x"}
    with pytest.raises(ConfigError, match=r"data\.input_vectors is 'x'.*model\.init_from"):
        recipe(data=data, model={"init_from": str(tmp_path / "first")})


def test_a_finished_run_is_evaluated_without_the_file(tmp_path: Path) -> None:
    write(tmp_path / "vectors.txt", ["film"])
    data = {"generated": "sentiment", "tokenizer": WORDS, "input_vectors": str(tmp_path / "vectors.txt")}
    train(recipe(directory=tmp_path / "run", data=data, model=CLASSIFIER, run={"max_eval_samples": 4}))
    (tmp_path / "vectors.txt").unlink()
    assert TEXT_ENCODER["embedding_size"] == SIZE
    assert main(["evaluate", str(tmp_path / "run"), "--split", "validation"]) == 0
