"""Image and frame bytes -> tensors, the same in training and serving (preprocessor_config.json).

Nothing is decoded before its format and its size in pixels are known to be allowed: a PNG of 20 kB can hold 169
million pixels. Imports Pillow only when called.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from seqmodels.config import Strict
from seqmodels.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")


class Preprocessor(Strict):
    """Resize to `size` (height, width), scale to 0..1, then (x - mean) / std per channel."""

    size: tuple[PositiveInt, PositiveInt]
    channels: Literal[1, 3] = 3
    mean: Annotated[tuple[float, ...], Field(min_length=1, max_length=3)] = (0.5,)
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=3)] = (0.5,)
    max_pixels: PositiveInt = 20_000_000

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("mean", "std"):
            if len(getattr(self, name)) not in (1, self.channels):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values, but there are {self.channels} channels"
                )
        return self

    def image(self, data: "bytes | Image", param: str | None = None) -> Tensor:
        """One picture -> (C, height, width) of float32.

        Raises InputError for a file that is broken or too large, UnsupportedError for a format not in FORMATS.
        """
        picture = self._open(data, param) if isinstance(data, bytes) else data
        try:
            upright = _upright(_eight_bits(picture))
            fitted = upright.convert("L" if self.channels == 1 else "RGB").resize((self.size[1], self.size[0]))
        except (
            Exception
        ):  # decoders of damaged files raise anything: OSError, SyntaxError, struct.error, TypeError, ...
            raise _broken(param) from None
        pixels = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        values = pixels.view(*self.size, self.channels).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return ((values - mean) / std).contiguous()

    def check(self, data: bytes) -> None:
        """Raises what `image` would, for much less: a file is read to its end, but a JPEG drawn at an eighth."""
        picture = self._open(data, None)
        try:
            picture.draft(None, (1, 1))
            picture.load()
        except Exception:  # as above
            raise _broken(None) from None

    def frames(self, data: "Sequence[bytes | Image]", param: str | None = None) -> Tensor:
        """Pictures in order of time -> (S, C, height, width) of float32."""
        return torch.stack([self.image(frame, f"{param}[{i}]" if param else None) for i, frame in enumerate(data)])

    def _open(self, data: bytes, param: str | None) -> "Image":
        from PIL import Image, UnidentifiedImageError

        try:
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise UnsupportedError(f"not an image in one of the formats {', '.join(FORMATS)}", param=param) from None
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
            raise InputError("the image is broken or too large", param=param, code="invalid_image") from None
        if picture.width * picture.height > self.max_pixels:
            raise InputError(
                f"the image has {picture.width} x {picture.height} pixels, but at most {self.max_pixels} are allowed; "
                "send a smaller one",
                param=param,
                code="limit_exceeded",
            )
        return picture


def num_pixels(data: bytes) -> int:
    """Of a picture, as its first bytes tell; nothing is drawn. 0 where it is none: whoever draws it will say why."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            return picture.width * picture.height
    except Exception:  # as above
        return 0


def _broken(param: str | None) -> InputError:
    return InputError("the image is broken or cut short; send a whole file", param=param, code="invalid_image")


def _eight_bits(picture: "Image") -> "Image":
    """16-bit greys scaled to 8 bits: Pillow's own conversion would clip them to black and white."""
    if not picture.mode.startswith("I"):
        return picture
    return picture.convert("I").point(lambda value: value / 257).convert("L")


def _upright(picture: "Image") -> "Image":
    """Turned as its EXIF says. Only that one tag is read: Pillow's own function writes the block anew, and fails on
    damaged ones, which some cameras make."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(picture.getexif().get(0x0112, 1))
    except Exception:  # a damaged block says nothing about the pixels
        turn = None
    return picture if turn is None else picture.transpose(turn)
