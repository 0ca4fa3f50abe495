"""Damage checkpoints, again and again: each is to be noticed, and the one before it to be loaded in its place.

python -m tests.training.corruption --count 10000
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from tests.training.kill_storm import recipe_fields
from training import checkpoint
from training.parsing import parse_recipe
from training.run import train

FILES = (checkpoint.TENSORS, checkpoint.PROGRESS, checkpoint.SUMS)
Damage = Callable[[Path, Path, random.Random], None]  # (newest checkpoint, the one before, source of chance)


def truncated(newest: Path, before: Path, source: random.Random) -> None:
    path = newest / source.choice(FILES)
    path.write_bytes(path.read_bytes()[: source.randrange(path.stat().st_size)])


def flipped(newest: Path, before: Path, source: random.Random) -> None:
    path = newest / source.choice(FILES)
    data = bytearray(path.read_bytes())
    data[source.randrange(len(data))] ^= 1 << source.randrange(8)
    path.write_bytes(data)


def zeroed(newest: Path, before: Path, source: random.Random) -> None:
    path = newest / source.choice(FILES)
    data = bytearray(path.read_bytes())
    first = source.randrange(len(data))
    count = min(len(data) - first, source.choice((1, 512, 4096)))
    data[first : first + count] = bytes(count)
    path.write_bytes(data)


def swapped(newest: Path, before: Path, source: random.Random) -> None:
    """Some files, or all, are those of the checkpoint before."""
    for name in source.sample(FILES, source.randint(1, len(FILES))):
        shutil.copyfile(before / name, newest / name)


def missing(newest: Path, before: Path, source: random.Random) -> None:
    (newest / source.choice(FILES)).unlink()


DAMAGES: tuple[Damage, ...] = (truncated, flipped, zeroed, swapped, missing)


def corrupt(count: int, seed: int = 1) -> Counter[str]:
    """Damage the newest checkpoint of a real run so often. Raises AssertionError where one is loaded all the same, or
    the good one is not."""
    source, done = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        train(parse_recipe(recipe_fields(0, run)))
        before, newest = checkpoint.saved_checkpoints(run / "checkpoints")
        whole = {name: (newest / name).read_bytes() for name in FILES}
        while done.total() < count:
            damage = DAMAGES[done.total() % len(DAMAGES)]
            damage(newest, before, source)
            if contents(newest) == whole:  # zeros where there were zeros
                continue
            found = checkpoint.load_newest(newest.parent)
            assert found is not None and found[0].step == int(before.name[5:13]), damage.__name__
            assert len(found[2]) == 1 and newest.name in found[2][0], found[2]
            done[damage.__name__] += 1
            for name, data in whole.items():
                (newest / name).write_bytes(data)
    return done


def contents(checkpoint_directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in checkpoint_directory.iterdir()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    print(json.dumps({"damaged": corrupt(options.count, options.seed), "all_noticed": True}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
