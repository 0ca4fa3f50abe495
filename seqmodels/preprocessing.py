"""Image and frame bytes -> tensors, the same in training and serving (preprocessor_config.json).

Nothing is decoded before its format and its size in pixels are known to be allowed: a PNG of 20 kB can hold 169
million pixels. What shines through is laid over white, but for 16-bit greys with one transparent shade. Imports Pillow
only when called.
"""

import io
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor

from seqmodels.clips import FORMATS, GIF, PictureFile, extent, has_cover
from seqmodels.config import Strict
from seqmodels.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from PIL.Image import Image, Transpose


class Preprocessor(Strict):
    """Resize to `size` (height, width), scale to 0..1, then (x - mean) / std per channel.

    max_pixels: of a picture; half of it where decoding takes twice the memory, which is of a WebP and of what moves.
    Drawing takes up to 12 bytes for each pixel that is allowed.
    """

    size: tuple[PositiveInt, PositiveInt]
    channels: Literal[1, 3] = 3
    mean: Annotated[tuple[float, ...], Field(min_length=1, max_length=3)] = (0.5,)
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1, max_length=3)] = (0.5,)
    max_pixels: PositiveInt = 15_000_000

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
        try:
            return self._tensor(_opaque(self._open(data, param) if isinstance(data, bytes) else data))
        except InputError:
            raise
        except Exception:  # decoders of damaged files raise nearly anything
            raise _broken(param) from None

    def check(self, data: bytes) -> None:
        """Raises what `image` would, for much less: a file is read to its end, but a JPEG drawn at an eighth."""
        picture = self._open(data, None)
        try:
            picture.draft(None, (1, 1))
            picture.load()
        except Exception:  # as above
            raise _broken(None) from None

    def frames(
        self, data: "bytes | Sequence[bytes | Image]", param: str | None = None, most: int | None = None
    ) -> Tensor:
        """Pictures in order of time, or one animated file -> (S, C, height, width) of float32. A still file is one
        frame. most: of an animated file, how many frames to draw."""
        if isinstance(data, bytes):
            return torch.stack([self._tensor(frame) for frame in self._displayed(data, param, most)])
        return torch.stack([self.image(frame, f"{param}[{i}]" if param else None) for i, frame in enumerate(data)])

    def split(self, data: bytes) -> list[bytes]:
        """Each frame of an animated file as a file of its own, at the model's size, which `image` reads as `frames`
        reads the whole. Without compression, so that every version of every library writes the same bytes."""
        return [_file(self._fitted(frame)) for frame in self._displayed(data)]

    def _displayed(self, data: bytes, param: str | None = None, most: int | None = None) -> "Iterator[Image]":
        """Frames as they are shown: Pillow lays each over those before it. Each is drawn when its turn comes."""
        picture = self._open(data, param)
        count, pixels = extent(data)
        if count > 1:
            self._check_pixels(pixels, self.max_pixels // 2, "a frame", param)
        first = int(has_cover(picture))
        for number in range(first, first + (count if most is None else min(count, most))):
            try:
                picture.seek(number)
                frame = _opaque(picture)
            except Exception:  # as above
                raise _broken(param) from None
            yield frame

    def _fitted(self, picture: "Image") -> "Image":
        mode = "L" if self.channels == 1 else "RGB"
        return (picture if picture.mode == mode else picture.convert(mode)).resize((self.size[1], self.size[0]))

    def _tensor(self, picture: "Image") -> Tensor:
        pixels = torch.frombuffer(bytearray(self._fitted(picture).tobytes()), dtype=torch.uint8)
        values = pixels.view(*self.size, self.channels).permute(2, 0, 1).float() / 255
        mean, std = torch.tensor(self.mean)[:, None, None], torch.tensor(self.std)[:, None, None]
        return ((values - mean) / std).contiguous()

    def _open(self, data: bytes, param: str | None) -> "Image":
        from PIL import Image, UnidentifiedImageError

        if data.startswith(GIF):  # opening one makes room for its first frame
            frames, pixels = extent(data)
            if not frames:
                raise _broken(param)
            self._check_pixels(pixels, self.max_pixels, "the image", param)
        try:
            picture = Image.open(PictureFile(data), formats=FORMATS)
        except UnidentifiedImageError:
            raise UnsupportedError(f"not an image in one of the formats {', '.join(FORMATS)}", param=param) from None
        except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError):
            raise InputError("the image is broken or too large", param=param, code="invalid_image") from None
        most = self.max_pixels // 2 if picture.format == "WEBP" else self.max_pixels
        self._check_pixels(picture.width * picture.height, most, "the image", param)
        return picture

    @staticmethod
    def _check_pixels(pixels: int, most: int, what: str, param: str | None) -> None:
        if pixels > most:
            message = f"{what} has {pixels} pixels, but at most {most} are allowed; send a smaller one"
            raise InputError(message, param=param, code="limit_exceeded")


def _broken(param: str | None) -> InputError:
    return InputError("the image is broken or cut short; send a whole file", param=param, code="invalid_image")


def _opaque(picture: "Image") -> "Image":
    """Upright, in 8 bits, and laid over white where it is transparent. The name is bound anew at each step, so that no
    more copies than two live at a time."""
    from PIL import Image

    picture.load()
    turn = _turn(picture)
    if picture.mode.startswith("I"):  # 16-bit greys: Pillow's own conversion would clip them to black and white
        picture = picture.convert("I")
        picture = picture.point(lambda value: value / 257)
        picture = picture.convert("L")
    elif picture.has_transparency_data:
        if picture.mode not in ("LA", "RGBA"):
            picture = picture.convert("RGBA")
        page = Image.new("RGB", picture.size, "white")
        page.paste(picture, mask=picture)
        picture = page
    return picture if turn is None else picture.transpose(turn)


def _file(picture: "Image") -> bytes:
    file = io.BytesIO()
    picture.save(file, "BMP")
    return file.getvalue()


def _turn(picture: "Image") -> "Transpose | None":
    """What its EXIF says is to be done. Only that one tag is read: Pillow's own function writes the block anew, and
    fails on damaged ones, which some cameras make."""
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
        return turns.get(picture.getexif().get(0x0112, 1))
    except Exception:  # a damaged block says nothing about the pixels
        return None
