"""Pictures: every kind of file, damaged ones, and those that claim too much."""

import io
import random

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


def test_a_picture_turned_by_exif_stands_upright() -> None:
    picture = Image.new("RGB", (4, 8), (0, 0, 0))
    picture.paste((255, 255, 255), (0, 0, 4, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", exif=exif)
    upright = Preprocessor(size=(8, 4)).image(buffer.getvalue())
    assert upright[0, 0, 0] < upright[0, 7, 0]


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
