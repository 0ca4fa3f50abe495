"""Row: one item of data in the form that the rest of training reads, whatever it was read from.

`input` is what a user of the served model would send; `target` is what we would like it to answer.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# text | words | one picture's bytes | the bytes of each frame | steps of numbers | nothing
Input = str | tuple[str, ...] | bytes | tuple[bytes, ...] | tuple[tuple[float, ...], ...] | None


@dataclass(frozen=True, slots=True)
class Row:
    """input: see above. target: a label, or a tag for each step, or one or more references of one text; all labels
    that are right; the numbers of a regression, written out."""

    input: Input
    target: str | tuple[str, ...]

    @property
    def item(self) -> Any:
        """The input as `Pipeline.prepare` takes it."""
        if self.input is None or isinstance(self.input, str):
            return self.input
        if isinstance(self.input, bytes):
            return {"image": self.input}
        if isinstance(self.input[0], str):
            return {"words": list(self.input)}
        if isinstance(self.input[0], bytes):
            return {"frames": list(self.input)}
        return {"features": [list(step) for step in self.input]}

    @property
    def pictures(self) -> tuple[bytes, ...]:
        """The input's files: a picture, or the frames of a clip; none of other inputs."""
        given = self.input if isinstance(self.input, tuple) else (self.input,)
        return tuple(one for one in given if isinstance(one, bytes))

    @property
    def references(self) -> tuple[str, ...]:
        """The texts that would be right answers."""
        return (self.target,) if isinstance(self.target, str) else self.target


def fingerprint(splits: Mapping[str, Sequence[Row]]) -> str:
    """sha256 hex over all rows of the given splits, in order."""
    digest = hashlib.sha256()
    for name, rows in sorted(splits.items()):
        digest.update(f"{name} {len(rows)}\n".encode())
        for row in rows:
            for part in _parts(row):
                digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def in_order(label: str) -> tuple[int, str]:
    """What labels are sorted by: names by the alphabet, then class numbers by their size."""
    return int(label) if label.isdecimal() else -1, label


def _parts(row: Row) -> Iterable[bytes]:
    for value in (row.input, row.target):
        for part in value if isinstance(value, tuple) else (value,):
            yield part if isinstance(part, bytes) else repr(part).encode("utf-8", "surrogatepass")
