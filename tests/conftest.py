"""What all tests share: one thread, fixed seeds, and the place of the real data sets."""

import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2")  # before any test uses a GPU; see training/run.py

ROOT = Path(__file__).parent.parent


torch.set_num_threads(1)  # small models gain nothing from more, and the machine's cores are shared


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _whole_float32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU computes is compared with a CPU's, so cuDNN's recurrences must not round to the 10 bits of TF32."""
    if request.node.get_closest_marker("gpu"):
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def data_directory() -> Path:
    """Local copies of the real data sets, laid out as on the hub. Tests that use them skip where they are absent."""
    path = Path(os.environ.get("SEQMODELS_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip("no real data here: set SEQMODELS_DATA to a folder that holds it")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("slow") and not os.environ.get("SEQMODELS_SLOW"):
            item.add_marker(pytest.mark.skip(reason="a long check: set SEQMODELS_SLOW=1"))
