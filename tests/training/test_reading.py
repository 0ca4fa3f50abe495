"""Rows from files and from the hub: what is read, what is refused, and how it is named."""

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image

from seqmodels.errors import DataError
from seqmodels.preprocessing import Preprocessor
from tests.training.recipes import LANGUAGE_MODEL, TAGGER, TRANSLATOR, WORDS, recipe
from training.data.cut import cut_text
from training.data.formats import read_json
from training.data.generated import generate
from training.data.reader import RowReader
from training.data.rows import Row
from training.data.sources import load_rows

CUT = {"cut": {"validation": 1}}


def write_csv(path: Path, rows: list[tuple[Any, ...]], header: str = "text,label") -> Path:
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n", encoding="utf-8")
    return path


def csv_recipe(path: Path, **data: Any) -> Any:
    columns = {"input": "text", "target": "label"}
    return recipe(data={"path": str(path), "columns": columns, "tokenizer": WORDS, **data})


def test_label_strings_and_class_numbers_both_load(tmp_path: Path) -> None:
    words = write_csv(tmp_path / "words.csv", [(f"text {n}", "good" if n % 2 else "bad") for n in range(20)])
    numbers = write_csv(tmp_path / "numbers.csv", [(f"text {n}", n % 2) for n in range(20)])
    cut = {"validation": 4}
    by_words = load_rows(csv_recipe(words, cut=cut))
    by_numbers = load_rows(csv_recipe(numbers, cut=cut, label_names=["bad", "good"]))
    bare = load_rows(csv_recipe(numbers, cut=cut))
    assert by_words == by_numbers
    assert {row.target for row in bare["train"]} == {"0", "1"}


@pytest.mark.parametrize("value", ["0", "1", "0.0", "1.0"])
def test_class_numbers_in_any_spelling_have_names(tmp_path: Path, value: str) -> None:
    path = write_csv(tmp_path / "rows.csv", [("a", value), ("b", 0), ("c", "good")])
    rows = load_rows(csv_recipe(path, **CUT, label_names=["bad", "good"]), ("train", "validation"))
    assert {row.target for part in rows.values() for row in part if row.input == "a"} == {
        ["bad", "good"][value > "0.9"]
    }


def test_a_csv_is_read_as_it_is_written(tmp_path: Path) -> None:
    cells = [("NA", "01"), ("None", "1"), ("nan", "null"), ("1e3", "-1"), ("caf\u00e9", "NA"), ('"a, ""b"""', "+1")]
    (tmp_path / "folder").mkdir()
    for folder, of_folder in ((tmp_path, False), (tmp_path / "folder", True)):
        path = write_csv(folder / "train.csv", cells)
        rows = load_rows(csv_recipe(folder if of_folder else path), ("train",))
        expected = [*cells[:-1], ('a, "b"', "+1")]
        assert [(row.input, row.target) for row in rows["train"]] == expected
    (tmp_path / "rows.tsv").write_text("\ufefftext\tlabel\na,b\t1\n\nc\t2\n", encoding="utf-8")
    rows = load_rows(csv_recipe(tmp_path / "rows.tsv"), ("train",))
    assert rows["train"] == [Row("a,b", "1"), Row("c", "2")]


def test_minus_one_is_unlabelled_only_where_the_data_names_its_classes(tmp_path: Path) -> None:
    for labels, complaint in (([0, 1, -1], "row 3, column 'label' holds -1, so it is unlabelled"), ([0, 1, 0], "")):
        features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["b", "g"])})
        table = datasets.Dataset.from_dict({"text": ["x", "y", "z"], "label": labels}, features=features)
        table.to_parquet(tmp_path / "rows.parquet")
        made = csv_recipe(tmp_path / "rows.parquet")
        if complaint:
            with pytest.raises(DataError, match=complaint):
                load_rows(made, ("train",))
    assert [row.target for row in load_rows(made, ("train",))["train"]] == ["b", "g", "b"]
    with pytest.raises(DataError, match="names its classes itself"):
        load_rows(csv_recipe(tmp_path / "rows.parquet", label_names=["x", "y"]), ("train",))


def test_rows_left_out_are_counted(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", [("a", 1), ("", 0), ("  ", 1), ("d", 0)])
    said: list[str] = []
    assert len(load_rows(csv_recipe(path), ("train",), said.append)["train"]) == 2
    assert said == ["split train: left out 2 of 4 rows, empty in text or label"]


def test_only_what_is_asked_for_is_needed(tmp_path: Path) -> None:
    """An evaluation on other data needs no training split."""
    path = write_csv(tmp_path / "new.csv", [("a", 1), ("b", 0)])
    made = csv_recipe(path, splits={"train": "none", "test": "train"}, cut={"validation": 1})
    assert len(load_rows(made, ("test",))["test"]) == 2
    with pytest.raises(DataError, match="has no split 'none'"):
        load_rows(made, ("validation",))


TAG_ROW = {"words": ["a", "b"], "tags": ["O", "O"]}
TAG_DATA = {"path": "x", "columns": {"input": "words", "target": "tags"}}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"words": ["a", ""]}, ["column 'words' has nothing as word 2"]),
        ({"words": ["a", None]}, ["column 'words' has nothing as word 2"]),
        ({"tags": ["O", None]}, ["column 'tags' holds None, so it is unlabelled"]),
        ({"tags": ["O"]}, ["column 'tags' holds 1 tags for 2 steps"]),
        ({"tags": ["O", -100]}, ["column 'tags' holds -100, so it is unlabelled"]),
        ({"tags": None}, ["column 'tags' holds no tags, so it is unlabelled"]),
        ({"words": ["a", ["b"]]}, ["column 'words' holds ['b'], which is no text"]),
        ({"words": '["a", "b"]'}, ["list written as text", "separated by spaces"]),
        ({"tags": "['O', 'O']"}, ["list written as text", "separated by spaces"]),
        ({"tags": "[0, 1]"}, ["list written as text", "separated by spaces"]),
        ({"words": """["don't", 'a']"""}, ["list written as text", "separated by spaces"]),
    ],
)
def test_a_bad_row_of_words_is_named(row: dict[str, Any], words: list[str]) -> None:
    reader = RowReader(recipe("tag", data=TAG_DATA, model=TAGGER))
    table: list[dict[str, Any]] = [TAG_ROW, {**TAG_ROW, **row}]
    with pytest.raises(DataError) as error:
        reader.rows("train", table, print)
    assert all(word in str(error.value) for word in ["split train, row 2", *words]), str(error.value)


def test_words_and_tags_of_a_csv_are_split_at_white_space(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "tags.csv", [("a  b", "O B-X"), ("[ citation ]", "O O  O"), ("[1]", "O")], "words,tags")
    rows = load_rows(recipe("tag", data={**TAG_DATA, "path": str(path)}, model=TAGGER), ("train",))["train"]
    assert rows == [Row(("a", "b"), ("O", "B-X")), Row(("[", "citation", "]"), ("O", "O", "O")), Row(("[1]",), ("O",))]


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([[1, 2], [3]], ["step 2 holds 1 numbers", "2"]),
        ([[1, 2, 3]], ["step 1 holds 3 numbers"]),
        ([[]], ["step 1 holds 0 numbers"]),
        ([[1, None]], ["step 1", "no number within"]),
        ([None], ["step 1", "no number within"]),
        ([["a", "b"]], ["step 1", "no number within"]),
        ([[1, float("nan")]], ["step 1", "no number within"]),
        ([[1, 1e30]], ["step 1", "no number within"]),
        (3.5, ["holds 3.5, but must hold a list of steps"]),
        ("[[1, 2]]", ["must hold a list of steps", "JSON lines or parquet"]),
    ],
)
def test_bad_features_are_named(steps: Any, words: list[str]) -> None:
    columns = {"input": "series", "target": "label"}
    model = {"architecture": "classifier", "encoder": {"input": "features"}}
    reader = RowReader(recipe(data={"path": "x", "columns": columns}, model=model))
    good = {"series": [[1, 2], [3.5, 4]], "label": "a"}
    assert reader.rows("train", [good], print) == [Row(((1.0, 2.0), (3.5, 4.0)), "a")]
    with pytest.raises(DataError) as error:
        reader.rows("validation", [good, {**good, "series": steps}], print)
    named = ["split validation, row 2, column 'series'", *words]
    assert all(word in str(error.value) for word in named), str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": ["a", "b"]}, ["column 'text' holds ['a', 'b'], which is no text"]),
        ({"text": {"a": 1}}, ["column 'text' holds {'a': 1}, which is no text"]),
        ({"text": b"a"}, ["column 'text' holds b'a', which is no text"]),
        ({"label": ["a"]}, ["column 'label' holds ['a']", "model.problem_type=multi_label_classification"]),
        ({"label": {"a": 1}}, ["column 'label' holds {'a': 1}, which is no text"]),
        ({"label": None}, ["column 'label' holds None, so it is unlabelled"]),
    ],
)
def test_what_is_no_text_and_no_label_is_named(change: dict[str, Any], words: list[str]) -> None:
    reader = RowReader(csv_recipe(Path("x")))
    with pytest.raises(DataError) as error:
        reader.rows("train", [{"text": "a", "label": 0}, {"text": "b", "label": 1, **change}], print)
    assert all(word in str(error.value) for word in ["split train, row 2", *words]), str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "split train has no rows"),
        ("[]", "split train has no rows"),
        ('{"text": "a", "label": 0}\n\n{"text": "b" "label": 1}\n', "rows.jsonl: line 3 is no JSON: .*, column 14"),
        ('[{"text": "a", "label": 0},\n{"text": "b" "label": 1}]\n', "rows.jsonl: line 2 is no JSON: .*, column 14"),
        ('{"text": "a"}\n["b"]\n', "rows.jsonl: line 2 is .*; give an object of columns"),
        ('{"text": "a"}\n{"text": "\\ud83d"}\n', r"line 2 holds '\\ud83d', which is no character"),
        ("[" * 100_000, "line 1 cannot be read: maximum recursion"),
        ('{"text": ' + "9" * 5000 + "}", "line 1 cannot be read: Exceeds the limit"),
    ],
)
def test_broken_json_lines_say_where(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words):
        load_rows(csv_recipe(tmp_path / "rows.jsonl"), ("train",))


def test_json_is_read_as_it_is_written(tmp_path: Path) -> None:
    """`datasets` makes times of the first column and of the second, and numbers of one type of the third."""
    rows: list[dict[str, Any]] = [
        {"text": "1967-10-28", "label": "2001-01-01 12:00:00", "number": 1},
        {"text": "1999-01-02", "label": "2002-01-01T12:00:00Z", "number": 1.5, "more": "\u2028 \u0085"},
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    for name, content in (
        ("lines.jsonl", lines),
        ("marked.jsonl", "\ufeff" + lines.replace("\n", "\r\n\r\n")),
        ("list.json", json.dumps(rows, indent=1)),
        ("objects.json", "\r".join(json.dumps(row, indent=1) for row in rows)),
        ("joined.jsonl", lines.replace("\n", "")),
        ("lines.json", lines),
    ):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        found = load_rows(csv_recipe(tmp_path / name), ("train",))["train"]
        assert found == [Row(str(row["text"]), str(row["label"])) for row in rows]
        assert [row["number"] for row in read_json([tmp_path / name])] == [1, 1.5]
        assert [row["more"] for row in read_json([tmp_path / name])] == [None, "\u2028 \u0085"]
    (tmp_path / "texts.json").write_text('["a", "b"]', encoding="utf-8")
    assert read_json([tmp_path / "texts.json"]) == [{"text": "a"}, {"text": "b"}]


def test_a_folder_of_json_whose_readme_names_its_columns(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"1967-10-{10 + n}", "label": "gb"[n % 2], "other": n}) for n in range(4)]
    for name in ("train", "valid"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert load_rows(csv_recipe(tmp_path))["validation"][0] == Row("1967-10-10", "g")
    declared = """---
dataset_info:
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {"0": b, "1": g}}}}
---
"""
    (tmp_path / "README.md").write_text(declared, encoding="utf-8")
    assert load_rows(csv_recipe(tmp_path))["validation"][0] == Row("1967-10-10", "g")
    with pytest.raises(DataError, match="names its classes itself"):
        load_rows(csv_recipe(tmp_path, label_names=["b", "g"]))
    (tmp_path / "valid.jsonl").write_text('{"text": "a", "label": "x"}\n', encoding="utf-8")
    with pytest.raises(DataError, match="cannot be loaded: Invalid string class label x"):
        load_rows(csv_recipe(tmp_path))


@pytest.mark.parametrize("kind", ["image", "frames"])
def test_a_broken_picture_is_found_at_load(kind: str, tmp_path: Path) -> None:
    columns = {"input": "picture", "target": "label"}
    encoder = {"input": kind, "backbone": {"image_size": [32, 32], "channels": [4]}}
    model = {"architecture": "classifier", "encoder": encoder}
    reader = RowReader(recipe(data={"path": "x", "columns": columns}, model=model))
    whole = generate("captions")["train"][0].input
    assert isinstance(whole, bytes)
    (tmp_path / "scene.png").write_bytes(whole)

    def table(picture: Any) -> list[dict[str, Any]]:
        return [{"picture": cell if kind == "image" else [cell], "label": "a"} for cell in ({"bytes": whole}, picture)]

    path = {"bytes": None, "path": str(tmp_path / "scene.png")}
    assert reader.rows("train", table(path), print)[1].input == (whole if kind == "image" else (whole,))
    for bad, words in (
        (whole[:-40], "broken"),
        (b"GIF", "not an image"),
        ("nowhere.png", r"'nowhere.png', .* the path of a file \(looked for in /"),
        ("/nowhere.png", "'/nowhere.png', .* the path of a file$"),
        (None, "None"),
    ):
        if kind == "image" and bad is None:
            continue  # an empty cell, left out
        with pytest.raises(DataError, match=f"split train, row 2, column 'picture'.*{words}"):
            reader.rows("train", table(bad), print)


def test_a_clip_is_a_list_a_directory_or_one_animated_file(tmp_path: Path) -> None:
    encoder = {"input": "frames", "backbone": {"image_size": [16, 16], "channels": [4]}}
    columns = {"input": "clip", "target": "label"}
    made = recipe(data={"path": "x", "columns": columns}, model={"architecture": "classifier", "encoder": encoder})
    first, *rest = (Image.new("RGB", (8, 8), (20 * number, 0, 99)) for number in range(11))
    first.save(tmp_path / "clip.webp", save_all=True, append_images=rest, lossless=True)
    for name in ("clip", "none"):
        (tmp_path / name).mkdir()
    for number, frame in enumerate([first, *rest]):
        frame.save(tmp_path / "clip" / f"{number}.png")
    frames = [(tmp_path / "clip" / f"{number}.png").read_bytes() for number in range(11)]
    path, data = str(tmp_path / "clip.webp"), (tmp_path / "clip.webp").read_bytes()
    cells = [frames, str(tmp_path / "clip"), path, data, {"bytes": data, "path": None}, {"bytes": None, "path": path}]
    rows = RowReader(made).rows("train", [{"clip": cell, "label": "a"} for cell in [*cells, ""]], print)
    assert [len(row.input or ()) for row in rows] == [len(frames)] * len(cells)  # the empty cell is left out
    preprocessor = Preprocessor(size=(16, 16))
    for row in rows:
        assert torch.equal(preprocessor.frames(row.item["frames"]), preprocessor.frames(data))
    for bad, words in (
        (data[:-40], "broken"),
        (str(tmp_path / "none"), "holds no file"),
        ("none.gif", "a clip must be a list"),
    ):
        with pytest.raises(DataError, match=f"split train, row 1, column 'clip'.*{words}"):
            RowReader(made).rows("train", [{"clip": bad, "label": "a"}], print)


def test_column_names_with_blanks_are_shown_in_quotes(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "rows.csv", [("a", 1)], "text,my label")
    with pytest.raises(DataError, match=r"\(it has text, 'my label'\)"):
        load_rows(csv_recipe(path), ("train",))


def test_a_folder_of_splits_and_a_column_map(tmp_path: Path) -> None:
    for name, count in (("train", 6), ("validation", 3), ("test", 2)):
        lines = [json.dumps({"quelle": f"{name} {n}", "ziel": f"z {n}", "x": n}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    data = {"path": str(tmp_path), "columns": {"input": "quelle", "target": "ziel"}, "tokenizer": WORDS}
    made = recipe("translate", data=data, model=TRANSLATOR)
    rows = load_rows(made, ("train", "validation", "test"))
    assert [len(rows[name]) for name in rows] == [6, 3, 2]
    assert rows["test"][1] == Row("test 1", ("z 1",))


@pytest.mark.parametrize(
    ("rows", "data", "words"),
    [
        ([("a", 1), ("b", 0)], {}, ["validation", "data.cut.validation=0.1", "train"]),
        ([("a", 1), ("b", "")], CUT, ["split train, row 2, column 'label'", "unlabelled; label it or remove"]),
        ([], CUT, ["split train has no rows"]),
        ([("", 1), ("  ", 0)], CUT, ["every row of split train is empty in text or label"]),
        ([("a", 1), ("b", "x", 0)], CUT, ["rows.csv: row 2 has 3 fields", "the header names 2 columns"]),
        ([("a", "x", 1), ("b", "x", 0)], CUT, ["rows.csv: row 1 has 3 fields"]),
        ([("a", 1), ('"b', 0), ("c", 0)], CUT, ["line 3", "a quote is opened and never closed"]),
        ([("a", 1), ("b", "good")], {**CUT, "label_names": ["bad", "fine"]}, ["row 2", "good, which has no name in"]),
        ([("a", 1), ("b", -1)], {**CUT, "label_names": ["bad", "good"]}, ["row 2", "label -1", "data.label_names"]),
        ([("a", 1), ("b", 7)], {"cut": {"validation": 1}, "label_names": ["x", "y"]}, ["label 7", "data.label_names"]),
        ([("a", 1)], {**CUT, "columns": {"input": "txt", "target": "label"}}, ["'txt'", "text", "data.columns"]),
        ([("a", 1), ("b", 0)], {"splits": {"train": "treinta"}}, ["'treinta'", "data.splits.train"]),
        ([("a", 1), ("b", 0)], {"cut": {"validation": 2}}, ["data.cut", "cut less"]),
        ([("a", 1), ("A ", 0)], CUT, ["data.cut", "the 2 rows are all duplicates of each other"]),
    ],
)
def test_what_is_wrong_with_data_is_named_with_its_fix(
    tmp_path: Path, rows: list[tuple[Any, ...]], data: dict[str, Any], words: list[str]
) -> None:
    path = write_csv(tmp_path / "rows.csv", rows)
    with pytest.raises(DataError) as error:
        load_rows(csv_recipe(path, **data))
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_cut_of_a_split_that_the_data_has_is_said_to_be_unused(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_csv(tmp_path / f"{name}.csv", [(f"{name} {n}", n % 2) for n in range(10)])
    said: list[str] = []
    rows = load_rows(
        csv_recipe(tmp_path, cut={"validation": 2, "test": 2}), ("train", "validation", "test"), said.append
    )
    assert [len(split) for split in rows.values()] == [8, 10, 2]
    assert said == ["the data has a validation split of its own, so data.cut.validation is not used"]


def declared(path: Path, text: str) -> None:
    (path / "README.md").write_text(f"---\n{text}\n---\n", encoding="utf-8")


def test_a_csv_is_read_as_it_is_written_where_its_columns_are_declared_too(tmp_path: Path) -> None:
    write_csv(tmp_path / "train.csv", [("0049", "01", 1), ("NA", "NA", ""), ("1.50", "x", "2")], "text,label,other")
    of = "text: string", "label: string", "other: int64"
    declared(
        tmp_path,
        "dataset_info:\n  features:\n"
        + "".join("  - {{name: {}, dtype: {}}}\n".format(*one.split(": ")) for one in of),
    )
    found = load_rows(csv_recipe(tmp_path), ("train",))["train"]
    assert found == [Row("0049", "01"), Row("NA", "NA"), Row("1.50", "x")]
    write_csv(tmp_path / "test.csv", [], "text,label,other")
    assert load_rows(csv_recipe(tmp_path), ("train",))["train"] == found
    for name in ("train", "test"):
        (tmp_path / f"{name}.csv").unlink()
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": "01"}\n{"text": "b", "label": 2}\n', encoding="utf-8")
    assert [row.target for row in load_rows(csv_recipe(tmp_path), ("train",))["train"]] == ["01", "2"]


def test_what_a_readme_says_of_the_reading_of_a_csv(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("a;x\nb;y\n", encoding="utf-8")
    declared(
        tmp_path, 'configs:\n- config_name: default\n  data_files: train.csv\n  sep: ";"\n  column_names: [text, label]'
    )
    assert load_rows(csv_recipe(tmp_path), ("train",))["train"] == [Row("a", "x"), Row("b", "y")]
    declared(tmp_path, 'configs:\n- config_name: default\n  data_files: train.csv\n  sep: ";"')
    with pytest.raises(DataError, match=r"no column 'text' \(it has a, x\)"):
        load_rows(csv_recipe(tmp_path), ("train",))


@pytest.mark.parametrize("in_folder", [True, False])
def test_compressed_files_are_read_like_others(tmp_path: Path, in_folder: bool) -> None:
    for name, content, pack in (
        ("train.csv.gz", "text,label\n01,1967-10-28\n", gzip.compress),
        ("train.jsonl.bz2", '{"text": "01", "label": "1967-10-28"}\n', bz2.compress),
        ("train.ndjson", '{"text": "01", "label": "1967-10-28"}\n', bytes),
    ):
        (folder := tmp_path / name.replace(".", "")).mkdir()
        (folder / name).write_bytes(pack(content.encode()))
        path = folder if in_folder else folder / name
        assert load_rows(csv_recipe(path), ("train",))["train"] == [Row("01", "1967-10-28")]
    (tmp_path / "train.csv.gz").write_bytes(b"text,label\n")
    with pytest.raises(DataError, match="cannot be unpacked: Not a gzipped file"):
        load_rows(csv_recipe(tmp_path / "train.csv.gz"), ("train",))
    for suffix, pack in ((".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)):
        path = tmp_path / f"cut.csv{suffix}"
        path.write_bytes(pack(b"text,label\na,1\n")[:-9])
        with pytest.raises(DataError, match=f"cut.csv{suffix} cannot be unpacked: .*; it is damaged"):
            load_rows(csv_recipe(path), ("train",))


def test_no_number_is_no_text(tmp_path: Path) -> None:
    """NaN, as pandas writes what is missing."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n{"text": NaN, "label": 1}\n', encoding="utf-8")
    assert len(load_rows(csv_recipe(tmp_path / "rows.jsonl"), ("train",))["train"]) == 1
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": NaN}\n', encoding="utf-8")
    with pytest.raises(DataError, match="row 2, column 'label' holds None, so it is unlabelled"):
        load_rows(csv_recipe(tmp_path / "rows.jsonl"), ("train",))


@pytest.mark.parametrize("data", ["train.json", "train/a.csv", "train/red/1.png", "train.csv.gz", "train.conll"])
def test_a_licence_beside_any_data_is_no_data(tmp_path: Path, data: str) -> None:
    path = tmp_path / data
    path.parent.mkdir(parents=True, exist_ok=True)
    for name in ("LICENSE.txt", "README.txt", "notes.txt"):
        (tmp_path / name).write_text("Do as you like,\nbut do it\n", encoding="utf-8")
    (tmp_path / "more.txt").mkdir()
    task, columns, model = "generate", {"target": "text"}, LANGUAGE_MODEL
    match path.suffixes[-1]:
        case ".json":
            path.write_text('[{"text": "real"}]', encoding="utf-8")
        case ".csv":
            path.write_text("text\nreal\n", encoding="utf-8")
        case ".gz":
            path.write_bytes(gzip.compress(b"text\nreal\n"))
        case ".conll":
            path.write_text("real O\n", encoding="utf-8")
            task, columns, model = "tag", {"input": "column0", "target": "column1"}, TAGGER
        case ".png":
            Image.new("RGB", (8, 8)).save(path)
            (tmp_path / "train" / "blue").mkdir()
            Image.new("RGB", (8, 8)).save(tmp_path / "train" / "blue" / "2.png")
            encoder = {"input": "image", "backbone": {"image_size": [8, 8], "channels": [2]}}
            task, columns = "classify", {"input": "image", "target": "label"}
            model = {"architecture": "classifier", "encoder": encoder}
    rows = load_rows(recipe(task, data={"path": str(tmp_path), "columns": columns}, model=model), ("train",))["train"]
    if task == "classify":
        assert {row.target for row in rows} == {"red", "blue"}
    else:
        assert rows == [Row(("real",), ("O",)) if task == "tag" else Row(None, ("real",))]


def test_only_spaces_and_tabs_part_the_columns_of_a_tagger(tmp_path: Path) -> None:
    words = "a\x85b", "c\u2028d", "e\xa0f"
    (tmp_path / "train.conll").write_text(
        "".join(f"{word}\t O \n" for word in words) + " \t\n\ng O\n", encoding="utf-8"
    )
    columns = {"input": "column0", "target": "column1"}
    made = recipe("tag", data={"path": str(tmp_path), "columns": columns}, model=TAGGER)
    assert [row.input for row in load_rows(made, ("train",))["train"]] == [words, ("g",)]


def test_texts_are_of_the_split_in_their_names(tmp_path: Path) -> None:
    for name in ("ptb.train", "train-2", "valid", "Testing", "notes"):
        (tmp_path / f"{name}.txt").write_text(name, encoding="utf-8")
    data = {"path": str(tmp_path), "columns": {"target": "text"}}
    rows = load_rows(recipe("generate", data=data, model=LANGUAGE_MODEL), ("train", "validation", "test"))
    assert {role: [row.references[0] for row in rows[role]] for role in rows} == {
        "train": ["ptb.train", "train-2"],
        "validation": ["valid"],
        "test": ["Testing"],
    }
    own = {**data, "splits": {"train": "train-2", "validation": "valid"}}
    rows = load_rows(recipe("generate", data=own, model=LANGUAGE_MODEL))
    assert [row.references[0] for role in rows for row in rows[role]] == ["train-2", "valid"]
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "notes.md").write_text("no data", encoding="utf-8")
    (tmp_path / "train_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match=r"\(it has test, notes, train, validation\)"):
        load_rows(recipe("generate", data={**data, "splits": {"train": "x"}}, model=LANGUAGE_MODEL), ("train",))


def test_a_text_beside_tables_is_no_data(tmp_path: Path) -> None:
    for name in ("train", "validation"):
        write_csv(tmp_path / f"{name}.csv", [("a", 1), ("b", 0)])
    (tmp_path / "LICENSE.txt").write_text("Do as you like.", encoding="utf-8")
    assert [row.input for row in load_rows(csv_recipe(tmp_path))["train"]] == ["a", "b"]


def test_a_missing_path_an_odd_file_and_an_unknown_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_rows(csv_recipe(tmp_path / "nothing.csv"))
    (tmp_path / "rows.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"\.parquet"):
        load_rows(csv_recipe(tmp_path / "rows.xlsx"))
    with pytest.raises(DataError, match="sentiment"):
        load_rows(recipe(data={"generated": "sentimental"}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ["rows.csv is empty; its first line must name the columns"]),
        (b"text,label,text\na,1,b\n", ["two columns 'text'"]),
        (b"text,label\ncaf\xe9,1\nb,0\n", ["is not UTF-8 (byte 0xe9"]),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, content: bytes, words: list[str]) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    with pytest.raises(DataError) as error:
        load_rows(csv_recipe(tmp_path / "rows.csv", cut={"validation": 1}))
    assert all(word in str(error.value) for word in words) and "data.path=..." not in str(error.value)


def test_space_separated_columns_of_a_tagger(tmp_path: Path) -> None:
    text = "Anna NNP B-PER\nsleeps VBZ O\n\nin IN O\nNew NNP B-LOC\nYork NNP I-LOC\n"
    (tmp_path / "train.txt").write_text(text, encoding="utf-8")
    (tmp_path / "validation.txt").write_text(text, encoding="utf-8")
    columns = {"input": "column0", "target": "column2"}
    rows = load_rows(recipe("tag", data={"path": str(tmp_path), "columns": columns}, model=TAGGER))
    assert rows["train"][1] == Row(("in", "New", "York"), ("O", "B-LOC", "I-LOC"))
    spelt_otherwise = "\ufeff" + text.replace("\n", "\r\n").replace("O\r\n\r\n", "O\r\n \t\r\n")
    (tmp_path / "train.txt").write_text(spelt_otherwise, encoding="utf-8", newline="")
    again = load_rows(recipe("tag", data={"path": str(tmp_path), "columns": columns}, model=TAGGER))
    assert again["train"] == rows["train"]
    (tmp_path / "train.txt").write_text("Anna NNP B-PER\nsleeps O\n", encoding="utf-8")
    with pytest.raises(DataError, match="number of columns"):
        load_rows(recipe("tag", data={"path": str(tmp_path), "columns": columns}, model=TAGGER))


def test_a_running_text_is_cut_in_its_order(tmp_path: Path) -> None:
    text = "".join(chr(97 + n % 26) for n in range(1000))
    (tmp_path / "input.txt").write_text(text, encoding="utf-8")
    data = {"path": str(tmp_path), "columns": {"target": "text"}, "cut": {"validation": 0.05, "test": 0.05}}
    made = recipe("generate", data=data, model=LANGUAGE_MODEL)
    rows = load_rows(made, ("train", "validation", "test"))
    parts = [rows[name][0].references[0] for name in rows]
    assert [len(part) for part in parts] == [900, 50, 50]
    assert "".join(parts) == text
    with pytest.raises(DataError, match="cut less"):
        cut_text(rows["train"][0], {"validation": 900})


def test_brackets_in_the_name_of_a_file_are_no_pattern(tmp_path: Path) -> None:
    for name, text in (("rev[1].jsonl", "mine"), ("rev1.jsonl", "another's")):
        lines = [json.dumps({"text": f"{text} {n}", "label": "ab"[n % 2]}) for n in range(20)]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    columns = {"input": "text", "target": "label"}
    data = {"path": str(tmp_path / "rev[1].jsonl"), "columns": columns, "cut": {"validation": 4}, "tokenizer": WORDS}
    assert all(str(row.input).startswith("mine") for row in load_rows(recipe(data=data))["train"])


def test_brackets_in_the_name_of_a_folder_are_refused(tmp_path: Path) -> None:
    """`datasets` would read the other one."""
    for name in ("rev[1]", "rev1"):
        (tmp_path / name).mkdir()
        write_csv(tmp_path / name / "train.csv", [(name, 1), ("b", 0)])
    with pytest.raises(DataError, match=r"rev\[1\]', and .* for patterns; rename the folder"):
        load_rows(csv_recipe(tmp_path / "rev[1]"), ("train",))


def test_of_several_running_texts_in_one_cell_none_is_lost(tmp_path: Path) -> None:
    texts = [f"the text of number {number}" for number in range(20)]
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": texts}) + "\n", encoding="utf-8")
    data = {"path": str(tmp_path), "columns": {"target": "text"}, "cut": {"validation": 0.2}}
    rows = load_rows(recipe("generate", data=data, model=LANGUAGE_MODEL))
    found = {role: [text for row in rows[role] for text in row.references] for role in rows}
    assert sorted(found["train"] + found["validation"]) == sorted(texts) and len(found["validation"]) == 4
