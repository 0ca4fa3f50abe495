"""The model card: what a model directory says about itself to a person."""

from collections.abc import Mapping

from training.config import Recipe

PROBLEMS = {
    "single_label_classification": "gives one label to an input",
    "multi_label_classification": "gives any number of labels to an input",
    "regression": "gives numbers to an input",
}
DOES = {
    "tag": "gives a label to each step of an input",
    "translate": "reads a text and writes another",
    "caption": "describes what it sees in words",
    "generate": "goes on with a text",
}


def model_card(name: str, recipe: Recipe, facts: Mapping[str, object]) -> str:
    """Markdown. facts: shown as a table, results among them."""
    does = PROBLEMS[recipe.problem_type] if recipe.task == "classify" else DOES[recipe.task]
    table = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""# {name}

A recurrent model that {does}.

| | |
| --- | --- |
{table}

The validation split was used to choose the best step, so its figures flatter; those of `python -m training evaluate`
on the test split do not. `recipe.yaml` holds every setting.

Serve it with `python -m serving {name}`, or ask it offline with `python -m seqmodels`.
"""
