"""How the golden models were made, once:  python -m tests.golden.make

Small models trained for a few seconds on generated data, and what they answered on that day. Every later version must
load them and agree; so this is run again only for a new format version, never to make a failing test pass.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from seqmodels.forward import Forward, ForwardRequest
from seqmodels.pipeline import Pipeline
from seqmodels.pretrained import load_pretrained

HERE = Path(__file__).parent
RECIPES = Path(__file__).parents[2] / "recipes" / "demo"
MODELS = {
    "lstm-translator": ("numbers-en-fr", [
        "model.encoder.embedding_size=24", "model.encoder.recurrent.hidden_size=32",
        "model.encoder.recurrent.cell=lstm",
        "model.decoder.embedding_size=24", "model.decoder.recurrent.hidden_size=64",
        "model.decoder.recurrent.cell=lstm",
        "run.num_train_epochs=null", "run.max_steps=600",
    ]),
    "gru-tagger": ("number-tags", [
        "model.encoder.embedding_size=24", "model.encoder.recurrent.cell=gru", "model.encoder.recurrent.hidden_size=48",
        "run.num_train_epochs=null", "run.max_steps=800",
    ]),
}  # fmt: skip
INPUTS = {
    "lstm-translator": ["seven", "forty two", "one thousand nine hundred ninety nine", "eighty one thousand"],
    "gru-tagger": ["we paid forty two euros", "room seven is free", "nothing here"],
}
FILES = ("config.json", "model.safetensors", "generation_config.json", "README.md")


def main() -> None:
    for name, (recipe, overrides) in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "training", "train", str(RECIPES / f"{recipe}.yaml"), *overrides]
            subprocess.run([*command, f"run.output_dir={folder}/run"], check=True)
            shutil.rmtree(HERE / name, ignore_errors=True)
            (HERE / name).mkdir()
            for path in Path(folder, "run").iterdir():
                if path.name in FILES or path.name.endswith("tokenizer.json"):
                    shutil.copy(path, HERE / name)
        (HERE / f"{name}.json").write_text(json.dumps(answers(name), ensure_ascii=False, indent=1) + "\n")


def answers(name: str) -> dict[str, object]:
    """What the model says: answers as users get them, and raw scores of a fixed input."""
    torch.set_num_threads(1)
    pipeline = Pipeline.from_pretrained(HERE / name)
    options = {"num_beams": 4, "num_return_sequences": 2, "logprobs": True} if pipeline.config.decoder else {}
    return {"answers": pipeline(INPUTS[name], **options), "scores": scores(name)}


def scores(name: str) -> list[list[float]]:
    """Log-probabilities of a text, or probabilities of labels, for token ids 4 to 9."""
    forward = Forward(load_pretrained(HERE / name).model)
    forward.submit(ForwardRequest("golden", torch.arange(4, 10), (2, 5, 6, 7, 3) if "translator" in name else ()))
    (event,) = forward.step()
    return torch.atleast_2d(event.result.values).tolist()  # type: ignore[union-attr, arg-type, no-any-return]


if __name__ == "__main__":
    main()
