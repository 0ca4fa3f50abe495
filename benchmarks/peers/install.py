"""Installs the peers from PyPI, each into a virtual environment of its own below a scratch folder.

    python -m benchmarks.peers.install SCRATCH

torch comes first and alone, pinned, so that every system runs on the same kernels; the toolkits come without their own
requirements, which pin versions that no longer go together. Nothing installed is changed: what a toolkit lacks on
today's Python is mended in the running process, by the module here that drives it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

TORCH = "torch==2.13.0"
TOOLKITS = {"joeynmt": "joeynmt==2.3.0", "opennmt": "OpenNMT-py==3.5.1"}
NEEDS = {
    # sentencepiece: newer ones lack a method that JoeyNMT calls
    "joeynmt": """numpy setuptools protobuf sacrebleu sacremoses sentencepiece==0.2.0 subword-nmt matplotlib seaborn
        pyyaml six wrapt packaging tensorboard pillow pandas plotly datasets future importlib_metadata""",
    "opennmt": """numpy configargparse ctranslate2>=4,<5 tensorboard flask waitress pyonmttok>=1.37,<2 pyyaml sacrebleu
        rapidfuzz pyahocorasick six setuptools sentencepiece""",
}


def python_of(scratch: Path, peer: str) -> Path:
    return scratch / peer / "bin" / "python"


def install(scratch: Path, peer: str) -> None:
    """A no-op where it is installed already."""
    python = python_of(scratch, peer)
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(scratch / peer)], check=True)
    for packages in ([TORCH], ["safetensors", *NEEDS[peer].split()], ["--no-deps", TOOLKITS[peer]]):
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scratch", type=Path, help="where the environments are made")
    scratch = parser.parse_args().scratch.resolve()
    for peer in TOOLKITS:
        install(scratch, peer)


if __name__ == "__main__":
    main()
