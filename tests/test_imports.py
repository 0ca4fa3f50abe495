"""The arrow points one way: training -> seqmodels <- serving. They meet only in a saved model directory."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {"seqmodels": {"training", "serving"}, "training": {"serving"}, "serving": {"training"}}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide where the arrow points"
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_one_way(package: str) -> None:
    files = list((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported(path) & FORBIDDEN[package], path


def test_search_knows_no_text_and_the_library_no_server() -> None:
    for path in (ROOT / "seqmodels" / "decoding").glob("*.py"):
        names = {
            node.module
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom)
        }
        assert not names & {"seqmodels.tokenizer", "seqmodels.pipeline", "seqmodels.pretrained"}, path


def test_the_library_needs_few_packages() -> None:
    """`import seqmodels` and its pipeline run on a bare GPU box: no Ray, no datasets, no FastAPI, no Pillow."""
    code = "import sys, seqmodels.pipeline, seqmodels.__main__; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    loaded = set(modules.stdout.split())
    assert {"torch", "tokenizers", "safetensors", "pydantic"} <= loaded
    assert not loaded & {"ray", "datasets", "fastapi", "PIL", "rich", "yaml", "sacrebleu", "matplotlib", "starlette"}
