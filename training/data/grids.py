"""Grids of pictures, made once by a backbone that does not learn, in place of the pictures themselves.

    KEY.safetensors   digests (N, 32) uint8; grids (N, D, h, w), or vectors (N, V) of frames, of 16 or 32 bits
                      metadata: sha256, of both arrays

KEY names the weights, the preprocessing and the pictures, so that runs share a file, in the directory that
SEQMODELS_CACHE names, else in ~/.cache/seqmodels. It is mapped into memory, and can always be made anew: one that is
damaged is just absent.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqmodels.preprocessing import Preprocessor
from training.checkpoint import writing_whole

PICTURES_PER_CALL = 32
DECODERS = 2  # threads

Say = Callable[[int, int], None]  # pictures done, pictures in all


class Grids:
    """The grid of each picture that is here, by its file's bytes. file: which they are mapped from, if any."""

    def __init__(self, digests: Tensor, grids: Tensor, file: Path | None = None) -> None:
        self.file = file
        self._rows = {bytes(row): number for number, row in enumerate(digests.numpy())}
        self._grids = grids

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, picture: bytes) -> Tensor | None:
        """(D, h, w) or (V,), of float32; None of a picture that is not here."""
        row = self._rows.get(_digest(picture))
        return None if row is None else self._grids[row].float()


def cache_directory() -> Path:
    return Path(os.environ.get("SEQMODELS_CACHE") or Path.home() / ".cache" / "seqmodels")


def grids_of(
    pictures: Iterable[bytes],
    backbone: nn.Module,
    preprocessor: Preprocessor,
    directory: Path | None,
    told: Say,
    dtype: torch.dtype = torch.float16,
) -> Grids:
    """Read from `directory` what another call has left there, or make it, and leave it there, if it can be written;
    None: only make it. told: is called while they are made. Raises InputError for a picture that cannot be decoded."""
    unique = {_digest(picture): picture for picture in pictures}
    digests = sorted(unique)
    if directory is None:
        return Grids(_rows_of(digests), _made([unique[one] for one in digests], backbone, preprocessor, told, dtype))
    path = directory / f"{_key(digests, backbone, preprocessor, dtype)}.safetensors"
    if (found := _loaded(path)) is None:
        grids = _made([unique[one] for one in digests], backbone, preprocessor, told, dtype)
        arrays = {"digests": _rows_of(digests), "grids": grids}
        with suppress(OSError):  # a full disk, or one that may only be read, costs the next run time, not this one
            directory.mkdir(parents=True, exist_ok=True)
            with writing_whole(path) as temporary:
                save_file(arrays, temporary, {"sha256": _sha256(arrays)})
        found = _loaded(path)  # mapped, in place of what is in memory
        if found is None:
            return Grids(arrays["digests"], grids)
    return Grids(found["digests"], found["grids"], path)


@torch.no_grad()
def _made(
    pictures: Sequence[bytes], backbone: nn.Module, preprocessor: Preprocessor, told: Say, dtype: torch.dtype
) -> Tensor:
    """(N, D, h, w), or (N, V). Pictures of the next call are decoded while the backbone is at one."""
    device = next(backbone.parameters()).device
    backbone.eval()
    made: list[Tensor] = []
    with ThreadPoolExecutor(DECODERS) as pool:
        decoded = _ahead(pool, preprocessor.image, pictures)
        while batch := list(islice(decoded, PICTURES_PER_CALL)):
            made.append(backbone(torch.stack(batch).to(device)).to(dtype).cpu())
            told(min(len(pictures), len(made) * PICTURES_PER_CALL), len(pictures))
    return torch.cat(made)


def _ahead(pool: ThreadPoolExecutor, decode: Callable[[bytes], Tensor], pictures: Sequence[bytes]) -> Iterator[Tensor]:
    """Each picture decoded, in order, up to two calls' worth ahead of its turn."""
    waiting = [pool.submit(decode, picture) for picture in pictures[: 2 * PICTURES_PER_CALL]]
    following = iter(pictures[2 * PICTURES_PER_CALL :])
    while waiting:
        first = waiting.pop(0)
        if (picture := next(following, None)) is not None:
            waiting.append(pool.submit(decode, picture))
        yield first.result()


def _loaded(path: Path) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            expected = (file.metadata() or {}).get("sha256")
        arrays = load_file(path)
    except (OSError, SafetensorError):
        return None
    return arrays if arrays.keys() == {"digests", "grids"} and _sha256(arrays) == expected else None


def _key(digests: Sequence[bytes], backbone: nn.Module, preprocessor: Preprocessor, dtype: torch.dtype) -> str:
    key = hashlib.sha256(preprocessor.model_dump_json(exclude={"max_pixels"}).encode())  # a bound changes no feature
    key.update(str(dtype).encode())
    for name, tensor in sorted(backbone.state_dict().items()):
        key.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        key.update(tensor.cpu().numpy().tobytes())
    for digest in digests:
        key.update(digest)
    return key.hexdigest()[:32]


def _rows_of(digests: Sequence[bytes]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 32)


def _digest(picture: bytes) -> bytes:
    return hashlib.sha256(picture).digest()


def _sha256(arrays: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(arrays.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().data)
    return digest.hexdigest()
