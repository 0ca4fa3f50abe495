"""How fast pictures become features, beside the bare backbone; and where the time of one caption goes.

    python -m benchmarks.features [--pictures 320] [--threads 2] [--rounds 5] [--device cpu]

Photographs are noise of 500 x 375, as JPEG files; MobileNetV2 at 224 x 224 with random weights. One JSON line each:

    bare, ours   pictures a second: the backbone over tensors that stand in memory, in batches of 32; and what training
                 does before its first step, which reads, decodes and keeps. Taken in turns; medians of the rounds
    caption_ms   of one picture, beam 5, 12 tokens, with an attending decoder of two layers of 512 and 3,000 words:
                 decoding the file, the backbone (with the keys of attention), the search
"""

import argparse
import io
import json
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from seqmodels.config import ModelConfig
from seqmodels.decoding.generate import generate
from seqmodels.decoding.padding import ROW_FLOOR
from seqmodels.decoding.params import SearchParams
from seqmodels.decoding.request import Request
from seqmodels.encoders import ImageEncoder
from seqmodels.models import SequenceGenerator
from seqmodels.preprocessing import Preprocessor
from seqmodels.stepper import Stepper
from training.data.grids import PICTURES_PER_CALL, grids_of

TOKENS = 12
SEARCH = SearchParams(num_beams=5, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
MODEL = {
    "architecture": "generator",
    "encoder": {"input": "image", "backbone": {"kind": "mobilenet_v2"}},
    "decoder": {
        "vocab_size": 3000,
        "embedding_size": 256,
        "attention": "additive",
        "attention_from": "first",
        "attention_gate": True,
        "recurrent": {"cell": "lstm", "hidden_size": 512, "num_layers": 2},
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = SequenceGenerator(ModelConfig.parse(MODEL)).eval().to(options.device)
    preprocessor = Preprocessor(size=(224, 224), mean=(128 / 255,), std=(128 / 255,))
    files = [photograph(seed) for seed in range(options.pictures)]
    report = {"benchmark": "features", "device": options.device, "threads": options.threads}
    print(json.dumps({**report, **measure_features(model, preprocessor, files, options.rounds)}), flush=True)
    print(json.dumps({**report, **measure_caption(model, preprocessor, files[: options.rounds])}), flush=True)


def photograph(seed: int) -> bytes:
    """Soft noise, whose file is about as large as a photograph's."""
    noise = np.random.default_rng(seed).integers(0, 256, (47, 63, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure_features(
    model: SequenceGenerator, preprocessor: Preprocessor, files: Sequence[bytes], rounds: int
) -> dict[str, float]:
    assert isinstance(model.encoder, ImageEncoder)
    backbone, device = model.encoder.backbone, next(model.parameters()).device
    stacked = torch.split(torch.stack([preprocessor.image(file) for file in files]), PICTURES_PER_CALL)

    def bare() -> None:
        with torch.no_grad():
            for pictures in stacked:
                backbone(pictures.to(device)).cpu()

    ways = {"bare": bare, "ours": lambda: grids_of(files, backbone, preprocessor, None, lambda *_: None)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            rates[name].append(len(files) / _seconds(way))
    medians = {name: round(statistics.median(each), 1) for name, each in rates.items()}
    shares = [ours / bare for ours, bare in zip(rates["ours"], rates["bare"], strict=True)]
    return {**medians, "share": round(statistics.median(shares), 3)}


def measure_caption(
    model: SequenceGenerator, preprocessor: Preprocessor, files: Sequence[bytes]
) -> dict[str, dict[str, float]]:
    stepper, parts = Stepper(model), ("decode_file", "backbone", "search")
    taken: dict[str, list[float]] = {name: [] for name in parts}
    for file in [files[0], *files]:  # once to warm up
        start = time.perf_counter()
        picture = preprocessor.image(file)
        decoded = time.perf_counter()
        with torch.inference_mode():
            stepper.encode(picture[None].to(stepper.device).expand(ROW_FLOOR, -1, -1, -1), None)
        encoded = time.perf_counter()
        generate(stepper, [Request("a", picture, SEARCH)])
        search = time.perf_counter() - encoded - (encoded - decoded)  # which encodes once more
        for name, seconds in zip(parts, (decoded - start, encoded - decoded, search), strict=True):
            taken[name].append(seconds)
    return {"caption_ms": {name: round(1e3 * statistics.median(each[1:]), 1) for name, each in taken.items()}}


def _seconds(way: Callable[[], object]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=320, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    return parser


if __name__ == "__main__":
    main()
