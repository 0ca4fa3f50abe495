"""python -m recipes.digits FOLDER: handwritten digits as series of their 64 pixels, for `recipes/digits.yaml`.

The 1,797 pictures of 8 x 8 pixels that scikit-learn ships (UCI Optical Recognition of Handwritten Digits, Alpaydin and
Kaynak 1998, CC BY 4.0), which has to be installed: `pip install scikit-learn`. FOLDER/sequential.jsonl has each
picture's pixels row by row, FOLDER/permuted.jsonl all of them in one other order, which leaves no neighbours together.
"""

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

SIDE, BRIGHTEST = 8, 16
IN_ORDER = range(SIDE * SIDE)
ORDERS = {"sequential": list(IN_ORDER), "permuted": random.Random(1).sample(IN_ORDER, len(IN_ORDER))}


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if sys.argv[1:] in (["-h"], ["--help"]) else 2
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("recipes.digits needs scikit-learn, which ships the pictures: pip install scikit-learn")
        return 2
    digits = load_digits()
    write(Path(sys.argv[1]), (digits.data / BRIGHTEST).tolist(), digits.target.tolist())
    return 0


def write(folder: Path, pictures: Sequence[Sequence[float]], labels: Sequence[int]) -> None:
    """One file for each order of the pixels; a row is a series of one number a step, and a label."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, order in ORDERS.items():
        with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as file:
            for picture, label in zip(pictures, labels, strict=True):
                series = [[picture[place]] for place in order]
                file.write(json.dumps({"pixels": series, "label": str(label)}) + "\n")
        print(f"wrote {len(pictures)} series to {file.name}")


if __name__ == "__main__":
    sys.exit(main())
