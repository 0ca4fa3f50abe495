"""The shipped recipes on local copies of their data: rows load, encode, and a model takes a batch."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from seqmodels.errors import DataError
from seqmodels.models import build_model
from training.config import Recipe
from training.data.examples import Codec
from training.data.grids import Grids
from training.data.rows import Row
from training.data.sources import load_rows
from training.parsing import load_recipe
from training.run import _batches

pytestmark = pytest.mark.data

RECIPES = Path(__file__).parent.parent.parent / "recipes"
GERMAN = ("Zwei junge weiße Männer sind im Freien in der Nähe vieler Büsche.",)
FRENCH = ("Deux jeunes hommes blancs sont dehors près de buissons.",)
# Recipe: folder, rows of train and validation (None where the recipe cuts them), what the first target looks like.
LOCAL: Mapping[str, tuple[str, int | None, int | None, object]] = {
    "sst2": ("sst2", 67_349, 872, "negative"),
    "imdb": ("imdb", None, 2_000, "negative"),
    "multi30k-en-de": (
        "multi30k",
        29_000,
        1_014,
        GERMAN,
    ),
    "multi30k-en-fr": ("multi30k", 29_000, 1_014, FRENCH),
    "tatoeba-de-en": ("tatoeba_deu_eng", 161_843, 2_000, None),
    "ptb": ("ptb", 42_068, 3_370, None),
    "tinyshakespeare": ("tinyshakespeare", 1, 1, None),
    "ud-english-ewt": ("ud_english_ewt", 12_544, 2_001, None),
    "conll2000": ("conll2000", None, 894, None),
    "flickr8k-show-and-tell": ("flickr8k", 6_000, 800, None),
    "flickr8k-attention": ("flickr8k", 6_000, 800, None),
}


def local(name: str, data_directory: Path) -> Recipe:
    columns = ["data.columns.target=tags"] if name == "ud-english-ewt" else []  # on the hub the column is upos
    return load_recipe(RECIPES / f"{name}.yaml", [f"data.path={data_directory / LOCAL[name][0]}", *columns])


@pytest.mark.parametrize("name", LOCAL)
def test_a_recipe_reads_its_local_copy(name: str, data_directory: Path) -> None:
    _, num_train, num_validation, first = LOCAL[name]
    recipe = local(name, data_directory)
    rows = load_rows(recipe)
    assert num_train in (None, len(rows["train"]))
    assert num_validation is None or abs(len(rows["validation"]) - num_validation) <= 1
    assert first in (None, rows["train"][0].target)
    some = _some(recipe, rows["train"])
    codec = Codec.train(recipe, some)
    batches = _batches(recipe, codec, codec.encode(some))
    with torch.no_grad():
        out = build_model(codec.config)(**batches.batch(0, 0))
    assert torch.isfinite(out.loss) and int(out.num_targets) > 0


WITHOUT_PADDING = ("ptb", "tinyshakespeare")  # running text


@pytest.mark.parametrize("name", [name for name in LOCAL if name not in WITHOUT_PADDING])
def test_padding_wastes_at_most_a_twentieth(name: str, data_directory: Path) -> None:
    """With the recipe's own settings."""
    recipe = local(name, data_directory)
    rows = load_rows(recipe)["train"]
    rows = rows[:: {"imdb": 4, "tatoeba-de-en": 6}.get(name, 1)]  # where all would take long; fewer waste more
    codec = Codec.train(recipe, rows)
    if recipe.task == "caption":  # whose pictures come as grids
        codec = replace(codec, grids=Grids(torch.zeros(0, 32, dtype=torch.uint8), torch.zeros(0)))
    assert _batches(recipe, codec, codec.encode(rows)).padding_share <= 0.05


def _some(recipe: Recipe, rows: list[Row]) -> list[Row]:
    """Enough to try, from all over: IMDB has one label first, then the other."""
    if recipe.task == "generate":
        return [Row(None, (row.references[0][:20_000],)) for row in rows[:200]]
    return rows[:: max(1, len(rows) // 200)]


def test_imdbs_duplicates_do_not_cross_the_cut(data_directory: Path) -> None:
    rows = load_rows(local("imdb", data_directory))
    texts = [{" ".join(str(row.input).casefold().split()) for row in part} for part in rows.values()]
    assert not texts[0] & texts[1]


def test_an_absent_test_split_is_named(data_directory: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'test' \(it has train, validation\).*data\.cut\.test"):
        load_rows(local("sst2", data_directory), ("test",))


def test_flickrs_five_captions_are_five_examples(data_directory: Path) -> None:
    recipe = local("flickr8k-attention", data_directory)
    rows = load_rows(recipe)["validation"][:10]
    assert all(isinstance(row.input, bytes) and len(row.target) == 5 for row in rows)
    codec = Codec.train(recipe, rows)
    assert len(codec.encode(rows)) == 50
