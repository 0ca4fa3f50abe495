"""Pictures: every kind of file, damaged ones, and those that claim too much."""

import io
import random
from typing import Any, Literal

import pytest
from PIL import Image

from seqmodels.errors import InputError
from seqmodels.preprocessing import Preprocessor
from tests.seqmodels.conftest import png


def test_pictures_of_every_kind() -> None:
    preprocessor = Preprocessor(size=(8, 6), mean=(0.5, 0.5, 0.5), std=(0.25, 0.5, 1.0))
    for mode, kind in (("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("CMYK", "JPEG"), ("1", "PNG"), ("RGB", "WEBP")):
        assert preprocessor.image(png(mode, kind=kind)).shape == (3, 8, 6)
    red = Image.new("RGB", (6, 8), (255, 0, 51))
    assert preprocessor.image(red)[:, 0, 0].tolist() == pytest.approx([2.0, -1.0, -0.3])


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_check_finds_what_decoding_would(kind: str) -> None:
    whole, preprocessor = png(kind=kind, size=(64, 48)), Preprocessor(size=(8, 8))
    preprocessor.check(whole)
    for bad in (whole[: len(whole) // 2], whole[:10], b"", b"text"):
        with pytest.raises(InputError) as decoding:
            preprocessor.image(bad)
        with pytest.raises(InputError) as checking:
            preprocessor.check(bad)
        assert str(checking.value) == str(decoding.value)


A, B, C, D, E, F = ((10, 20, 30), (40, 50, 60), (70, 80, 90), (100, 110, 120), (130, 140, 150), (160, 170, 180))
# What is seen of the rows ABC, DEF under each orientation, by the standard's words for its first row and first column.
TURNED = {
    1: [[A, B, C], [D, E, F]],  # top, left
    2: [[C, B, A], [F, E, D]],  # top, right
    3: [[F, E, D], [C, B, A]],  # bottom, right
    4: [[D, E, F], [A, B, C]],  # bottom, left
    5: [[A, D], [B, E], [C, F]],  # left, top
    6: [[D, A], [E, B], [F, C]],  # right, top
    7: [[F, C], [E, B], [D, A]],  # right, bottom
    8: [[C, F], [B, E], [A, D]],  # left, bottom
}


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TRANSPARENT PNG"])
def test_a_picture_turned_by_exif_stands_upright(orientation: int, kind: str) -> None:
    picture = Image.new("RGB", (3, 2))
    picture.putdata([A, B, C, D, E, F])
    exif = Image.Exif()
    exif[0x0112] = orientation
    if kind.startswith("TRANSPARENT"):
        picture.putalpha(255)
    file = saved(picture, kind.split()[-1], exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    assert seen(file) == TURNED[orientation]


def test_a_jpeg_is_turned_too() -> None:
    picture = Image.new("L", (8, 16), 0)
    picture.paste(255, (0, 0, 8, 8))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # its first row is the right side
    (row,) = seen(saved(picture, "JPEG", exif=exif), size=(1, 16))
    assert row[0] == (0, 0, 0) and row[-1] == (255, 255, 255)


RED, CLEAR, HALF, BLUE = (200, 0, 0, 255), (0, 0, 0, 0), (100, 0, 50, 128), (0, 0, 200, 255)
# 255 less alpha is how much of the white page is seen: 127 of it, and 128 parts of 255 of the colour.
HALF_OVER_WHITE = (177, 127, 152)


def test_what_is_transparent_is_laid_over_white() -> None:
    rgba = Image.new("RGBA", (4, 1))
    rgba.putdata([RED, CLEAR, HALF, BLUE])
    expected = [[RED[:3], (255, 255, 255), HALF_OVER_WHITE, BLUE[:3]]]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        assert seen(saved(rgba, kind, **options)) == expected
    assert seen(rgba) == expected
    grey = Image.new("LA", (3, 1))
    grey.putdata([(10, 255), (0, 0), (100, 128)])
    assert seen(saved(grey, "PNG")) == [[(10,) * 3, (255,) * 3, (177,) * 3]]
    assert seen(saved(grey, "PNG"), channels=1) == [[(10,), (255,), (177,)]]


def test_a_palette_with_transparency() -> None:
    palette = Image.new("P", (3, 1))
    palette.putpalette([*RED[:3], *BLUE[:3], *HALF[:3]])
    palette.putdata([0, 1, 2])
    assert seen(saved(palette, "PNG")) == [[RED[:3], BLUE[:3], HALF[:3]]]
    for kind in ("PNG", "GIF"):
        assert seen(saved(palette, kind, transparency=1)) == [[RED[:3], (255, 255, 255), HALF[:3]]]
    partly = saved(palette, "PNG", transparency=bytes([255, 0, 128]))
    assert seen(partly) == [[RED[:3], (255, 255, 255), HALF_OVER_WHITE]]


def test_one_colour_that_stands_for_nothing() -> None:
    picture = Image.new("RGB", (2, 1))
    picture.putdata([RED[:3], BLUE[:3]])
    assert seen(saved(picture, "PNG", transparency=RED[:3])) == [[(255, 255, 255), BLUE[:3]]]
    grey = Image.new("L", (2, 1))
    grey.putdata([3, 7])
    assert seen(saved(grey, "PNG", transparency=7)) == [[(3, 3, 3), (255, 255, 255)]]


def test_printing_colours() -> None:
    """A JPEG of them holds what is left of white, and says that it is Adobe's."""
    cmyk = Image.new("CMYK", (8, 8), (255, 0, 0, 51))  # cyan, a fifth of the way to black
    file = saved(cmyk, "JPEG", quality=100)
    assert b"Adobe" in file
    assert seen(file, size=(1, 1)) == [[(0, 204, 204)]]


def test_sixteen_bits_and_one() -> None:
    deep = Image.new("I;16", (3, 1))
    deep.putdata([0, 257 * 100, 65535])
    assert seen(saved(deep, "PNG"), channels=1) == [[(0,), (100,), (255,)]]
    assert seen(saved(deep, "PNG", transparency=0)) == [[(0,) * 3, (100,) * 3, (255,) * 3]]  # a colour key is not kept
    bits = Image.new("1", (2, 1))
    bits.putdata([0, 255])
    for kind in ("PNG", "BMP", "GIF"):
        assert seen(saved(bits, kind)) == [[(0, 0, 0), (255, 255, 255)]]


def saved(picture: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(picture: bytes | Image.Image, size: tuple[int, int] | None = None, channels: Literal[1, 3] = 3) -> list[Any]:
    """Rows of colours from 0 to 255, as a model of the picture's own size gets them."""
    if size is None:
        width, height = Image.open(io.BytesIO(picture)).size if isinstance(picture, bytes) else picture.size
        if isinstance(picture, bytes) and Image.open(io.BytesIO(picture)).getexif().get(0x0112, 1) > 4:
            width, height = height, width
        size = height, width
    values = Preprocessor(size=size, channels=channels, mean=(0.0,), std=(1 / 255,)).image(picture)
    return [[tuple(round(value) for value in colour) for colour in row] for row in values.permute(1, 2, 0).tolist()]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_a_damaged_exif_block_says_nothing_about_the_pixels() -> None:
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    Image.new("RGB", (8, 8), (200, 0, 0)).save(buffer, "JPEG", exif=exif)
    whole, choose = buffer.getvalue(), random.Random(0)
    start = whole.index(b"Exif")
    for _ in range(2000):
        damaged = bytearray(whole)
        for _ in range(choose.randint(1, 4)):
            damaged[choose.randrange(start, start + 80)] = choose.randrange(256)
        try:
            assert Preprocessor(size=(8, 8)).image(bytes(damaged)).shape == (3, 8, 8)
        except InputError:  # UnsupportedError among them
            continue


def test_sixteen_bit_greys_keep_their_shades() -> None:
    picture = Image.new("I;16", (64, 1))
    picture.putdata([i * 1024 for i in range(64)])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    shades = Preprocessor(size=(1, 64), channels=1).image(buffer.getvalue())[0, 0]
    assert len(set(shades.tolist())) == 64


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    header = bytearray(png())
    header[16:24] = (13000).to_bytes(4, "big") * 2  # claims 169 million pixels
    import zlib

    header[29:33] = zlib.crc32(header[12:29]).to_bytes(4, "big")
    with pytest.raises(InputError, match=r"pixels|too large"):
        Preprocessor(size=(8, 8)).image(bytes(header))
