"""CSV, JSON and plain text -> rows, every text as the file spells it.

`datasets` would guess here: in a CSV it takes `NA` for nothing and `01` for a number, in JSON lines `1967-10-28` for a
point in time. Knows formats; knows no split and no recipe.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from seqmodels.errors import DataError

BLANKS = re.compile(r"[ \t\r\n]*")  # between two values of JSON
COMPRESSED = {".gz": gzip.decompress, ".bz2": bz2.decompress, ".xz": lzma.decompress}

csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document


def suffix_of(path: Path) -> str:
    """The format by its name, as `.csv` of a file that is compressed too."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def read_csv(paths: Sequence[Path], separator: str) -> list[dict[str, Any]]:
    """The files' rows, one after another. Raises DataError."""
    rows: list[dict[str, Any]] = []
    columns: list[str] = []
    for path in paths:
        lines = _csv_lines(path, separator)
        header = next(lines, [])
        if not header:
            raise DataError(f"{path.name} is empty; its first line must name the columns")
        if twice := sorted({name for name in header if name and header.count(name) > 1}):
            raise DataError(f"{path.name}: the header has two columns {twice[0]!r}; rename one")
        if columns and header != columns:
            raise DataError(f"{path.name} has other columns than {paths[0].name}, of the same split; make them alike")
        columns = header
        rows += [_csv_row(path, columns, number, fields) for number, fields in enumerate(lines, start=1)]
    return rows


def _csv_row(path: Path, columns: Sequence[str], number: int, fields: list[str]) -> dict[str, Any]:
    """Cells that are missing at a row's end are empty."""
    if len(fields) > len(columns):
        raise DataError(
            f"{path.name}: row {number} has {len(fields)} fields, but the header names {len(columns)} columns; put "
            "quotes around a field that holds the separator"
        )
    return dict(zip(columns, fields + [""] * (len(columns) - len(fields)), strict=True))


def _csv_lines(path: Path, separator: str) -> Iterator[list[str]]:
    """The fields of each line that is not empty, the header's first."""
    lines = csv.reader(io.StringIO(_text(path), newline=""), delimiter=separator, strict=True)
    began = 1
    try:
        for fields in lines:
            if fields:
                yield fields
            began = lines.line_num + 1
    except csv.Error as error:
        reason = "a quote is opened and never closed" if "end of data" in str(error) else str(error)
        raise DataError(
            f"{path.name}: the row that begins in line {began}: {reason}; put quotes around the field and write those "
            "inside it twice"
        ) from None


def read_json(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The files' rows, one after another: objects, usually one in each line, or one list of objects or of texts. What a
    row does not name, or NaN, is None in it. Raises DataError."""
    rows = [row for path in paths for row in _json_rows(path)]
    columns = dict.fromkeys(column for row in rows for column in row)
    for row in rows:
        if len(row) < len(columns):
            row |= {column: None for column in columns if column not in row}
    return rows


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, (line, value) in enumerate(_json_values(path)):
        in_list = number == 0 and isinstance(value, list)
        for place, item in enumerate(value if in_list else [value], start=1):
            row = {"text": item} if isinstance(item, str) else item
            if not isinstance(row, dict):
                where = f"item {place}" if in_list else f"line {line}"
                raise DataError(f"{path.name}: {where} is {str(item)[:60]!r}; give an object of columns, {{...}}")
            yield row


def _json_values(path: Path) -> Iterator[tuple[int, Any]]:
    """Each value, and the line that it begins in."""
    text = _text(path)
    decoder = json.JSONDecoder(parse_constant=lambda name: None if name == "NaN" else float(name))
    line, end = 1, 0
    while (begin := _after_blanks(text, end)) < len(text):
        line += text.count("\n", end, begin)
        try:
            value, end = decoder.raw_decode(text, begin)
            if "\\u" in text[begin:end]:  # half of a surrogate pair may be written so, and is no text
                json.dumps(value, ensure_ascii=False).encode()
        except json.JSONDecodeError as error:
            raise DataError(
                f"{path.name}: line {error.lineno} is no JSON: {error.msg}, column {error.colno}; give one object in "
                "each line, or one list of objects"
            ) from None
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise DataError(f"{path.name}: line {line} holds {half!a}, which is no character") from None
        except (ValueError, RecursionError) as error:  # of very long numbers, and of deep nesting
            raise DataError(f"{path.name}: line {line} cannot be read: {error}") from None
        yield line, value
        line += text.count("\n", begin, end)


def _after_blanks(text: str, place: int) -> int:
    found = BLANKS.match(text, place)
    assert found is not None
    return found.end()


def read_text(path: Path, task: str) -> list[dict[str, Any]]:
    """A running text for language models, or space-separated columns (column0, column1, ...) for taggers. Raises
    DataError."""
    text = _text(path).replace("\r\n", "\n").replace("\r", "\n")
    if task == "generate":
        return [{"text": text}]
    if task != "tag":
        raise DataError(f"{path.name}: plain text serves the tasks generate and tag; give CSV or JSON lines for {task}")
    return [_columns(block, path.name) for block in re.split(r"\n[ \t]*\n", text) if block.strip(" \t\n")]


def _columns(block: str, name: str) -> dict[str, Any]:
    """Spaces and tabs stand between columns; other white space may be part of a word."""
    lines = [re.split(r"[ \t]+", line.strip(" \t")) for line in block.split("\n") if line.strip(" \t")]
    if len({len(line) for line in lines}) != 1:
        raise DataError(f"{name}: the lines of a sentence differ in their number of columns, near {block[:40]!r}")
    return {f"column{number}": [line[number] for line in lines] for number in range(len(lines[0]))}


def _text(path: Path) -> str:
    """All of the file, less a byte order mark."""
    data = path.read_bytes()
    try:
        data = COMPRESSED.get(path.suffix, bytes)(data)
    except (EOFError, ValueError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path.name} cannot be unpacked: {error}; it is damaged, or of another format") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} cannot be loaded: {not_utf8(error)}") from None


def not_utf8(error: UnicodeDecodeError) -> str:
    return f"it is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}); convert it first"
