"""Files that mean harm to whoever draws them, or that are no pictures, by kind. Each is made from a source of random
numbers, from good files of every format that Pillow writes, or by hand.
"""

import gzip
import io
import json
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import cache

from PIL import Image

from .fuzz_bodies import damaged_picture
from .fuzz_pictures import bombs, file_of

SIZE = (64, 48)
ALLOWED = ("JPEG", "PNG", "GIF", "WEBP", "BMP")
EXOTIC = (
    "TIFF",
    "ICO",
    "PPM",
    "EPS",
    "PDF",
    "JPEG2000",
    "TGA",
    "DDS",
    "ICNS",
    "PCX",
    "SGI",
    "XBM",
    "IM",
    "MSP",
    "AVIF",
)
GOOD_PICTURE = file_of(Image.new("RGB", (8, 8), "red"), "PNG")


@cache
def good() -> list[bytes]:
    """Pictures with something in them, of each format and of each kind that it knows."""
    noise = Image.effect_noise(SIZE, 60)
    colours = Image.merge("RGB", [noise, noise.transpose(Image.Transpose.ROTATE_180), noise.point(lambda v: 255 - v)])
    see_through = Image.merge("RGBA", [*colours.split(), noise])
    deep = Image.frombytes("I;16", SIZE, bytes(range(256)) * (SIZE[0] * SIZE[1] * 2 // 256))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    return [
        file_of(colours, "JPEG", exif=exif), file_of(colours, "JPEG", progressive=True),
        file_of(colours.convert("CMYK"), "JPEG"), file_of(noise, "JPEG"),
        file_of(colours, "PNG", exif=exif), file_of(see_through, "PNG"), file_of(deep, "PNG"),
        file_of(colours.quantize(16), "PNG", transparency=3), file_of(noise.convert("1"), "PNG"),
        file_of(noise.convert("LA"), "PNG"), file_of(colours.quantize(200), "GIF", transparency=3),
        file_of(colours, "WEBP", exif=exif), file_of(see_through, "WEBP", lossless=True),
        file_of(colours, "BMP"), file_of(colours.quantize(16), "BMP"), file_of(noise.convert("1"), "BMP"),
    ]  # fmt: skip


@cache
def moving() -> list[bytes]:
    """Animated files, which lay frames over one another in every way."""
    frames = [Image.effect_noise(SIZE, 20 * n).convert("RGBA") for n in range(1, 7)]
    for n, frame in enumerate(frames):
        frame.paste((0, 0, 0, 0), (5 * n, 5, 5 * n + 20, 30))
    files = [file_of(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=n) for n in (0, 1, 2, 3)]
    files += [file_of(frames[0], "WEBP", save_all=True, append_images=frames[1:], lossless=n) for n in (True, False)]
    files += [
        file_of(frames[0], "PNG", save_all=True, append_images=frames[1:], disposal=n, blend=n % 2) for n in (0, 1, 2)
    ]
    return files


@cache
def exotic_files() -> list[bytes]:
    """What Pillow, or another program, would read, and a service need not."""
    Image.init()  # else only the common formats are known
    fitting = {"XBM": "1", "MSP": "1", "ICNS": "RGBA"}
    noise = Image.effect_noise(SIZE, 60)
    files = [file_of(noise.convert(fitting.get(form, "RGB")), form) for form in EXOTIC if form in Image.SAVE]
    return [
        *files,
        b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 48, 64, 8, 3) + bytes(12) + bytes(3 * 48 * 64),
        b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(200), b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(200),
        b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200), b"\xff\x0a" + bytes(200), b"qoif" + bytes(200),
        b"SIMPLE  =                    T" + b" " * 2000, b"\xd7\xcd\xc6\x9a" + bytes(200), b"v/1\x01" + bytes(200),
        b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><rect width="9"/></svg>',
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\nshowpage\n%%EOF\n",
    ]  # fmt: skip


@cache
def other_files() -> list[bytes]:
    """No pictures at all."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("picture.png", bytes(10_000_000))
    return [
        b"", b"\0", b" ", b"a picture of a dog", "ein Bild".encode("utf-16"), b"GIF", b"\xff\xd8\xff", b"BM",
        b"\x89PNG\r\n\x1a\n", b"RIFF\x10\0\0\0WEBPVP8 ", b"RIFF$\0\0\0WAVEfmt " + bytes(40),
        json.dumps({"image": "AAAA"}).encode(),
        b"<!doctype html><img src=x>", b"%PDF-1.7\n%%EOF", archive.getvalue(), gzip.compress(GOOD_PICTURE),
        b"\x7fELF\2\1\1" + bytes(500), b"MZ" + bytes(500), b"ID3\4" + bytes(500), b"OggS" + bytes(500),
        b"\0\0\0\x18ftypmp42" + bytes(500), b"\x1aE\xdf\xa3" + bytes(500), b"data:image/png;base64,iVBORw0KGgo=",
        b"GOOD" + GOOD_PICTURE, b"\xef\xbb\xbf" + GOOD_PICTURE,
    ]  # fmt: skip


@cache
def moving_bombs() -> list[bytes]:
    """Few bytes that ask for many frames, or for very large ones."""
    head = b"GIF89a" + struct.pack("<HHBBB", 4000, 4000, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"

    def frame(width: int, height: int) -> bytes:
        return b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00"

    tiny = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    cleared = b"!\xf9\x04\x08\0\0\0\0"  # what is to come is to be cleared afterwards
    large = [Image.new("L", (3750, 2000), shade) for shade in range(0, 250, 25)]
    wide = file_of(large[0], "WEBP", save_all=True, append_images=large[1:], lossless=True)
    claims = bytearray(file_of(large[0].resize((8, 8)), "PNG", save_all=True, append_images=[large[1].resize((8, 8))]))
    at = claims.index(b"acTL")
    claims[at + 4 : at + 8] = struct.pack(">I", 2**31 - 1)
    claims[at + 12 : at + 16] = struct.pack(">I", zlib.crc32(claims[at : at + 12]))
    return [
        head + frame(4000, 4000) * 10_000 + b";", head + frame(4000, 4000) * 3 + b";", tiny + frame(8, 8) * 200_000,
        tiny + frame(8, 8) + frame(65535, 65535) + b";", tiny + frame(8, 8) + frame(13_000, 13_000) + b";",
        tiny + frame(8, 8) * 63 + frame(4000, 4000) + b";", wide, bytes(claims),
        tiny + cleared + frame(13_377, 13_377) + b";", tiny + frame(8, 8) + cleared + frame(13_377, 13_377) + b";",
        file_of(large[0], "GIF", save_all=True, append_images=large[1:4]),
        file_of(Image.new("RGBA", (3750, 2000)), "WEBP", lossless=True),
        file_of(Image.new("RGBA", (3751, 2000)), "WEBP", lossless=True),
    ]  # fmt: skip


@cache
def costly_files() -> list[bytes]:
    """As large as is allowed, of the kinds that take most memory to draw; and a little larger."""
    most, beyond = (3750, 4000), (3751, 4000)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = []
    for size in (most, beyond):
        files += [
            file_of(Image.new("CMYK", size, 9), "JPEG", progressive=True, subsampling=0, exif=exif),
            file_of(Image.new("RGB", size), "JPEG", progressive=True, subsampling=0),
            file_of(Image.new("RGBA", size), "PNG", exif=exif), file_of(Image.new("LA", size), "PNG", exif=exif),
            file_of(Image.new("I;16", size), "PNG", exif=exif), file_of(Image.new("P", size), "PNG", transparency=0),
            file_of(Image.new("P", size), "GIF", transparency=0),
        ]  # fmt: skip
    return files


@cache
def stuffed_files() -> list[bytes]:
    """Small pictures among up to 4 MiB that a reader has to pass: empty parts, comments, and blocks of EXIF."""
    jpeg, gif = file_of(Image.new("RGB", (8, 8)), "JPEG"), file_of(Image.new("P", (8, 8)), "GIF")
    room, files = 4 * 2**20 - 2000, []
    for part in (
        b"\xff\xfe\0\2",
        b"\xff\xe1\0\2",
        b"\xff\xed\0\2",
        b"\xff",
        b"\xff\xe1\xff\xfdExif\0\0MM" + bytes(65525),
    ):
        files.append(jpeg[:2] + part * (room // len(part)) + jpeg[2:])
    for part in (b"!\xf9\x04\0\0\0\0\0", b"!\xfe\x01a\0", b"\x01", b"!\xfe" + (b"\xff" + bytes(255)) * 4000 + b"\0"):
        files.append(gif[: gif.index(b",")] + part * (room // len(part)) + gif[gif.index(b",") :])
    for name, data in ((b"abCd", b""), (b"tEXt", b"a\0"), (b"IDAT", b""), (b"eXIf", b"MM\0*" + bytes(100_000))):
        part = struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        files.append(GOOD_PICTURE[:33] + part * (room // len(part)) + GOOD_PICTURE[33:])
    return files


@cache
def exif_files() -> list[bytes]:
    """Blocks of EXIF that lead in circles, beyond their end, or to much: the pixels are good."""
    circle = b"MM\0*\0\0\0\x08\0\2" + struct.pack(">HHII", 0x8769, 4, 1, 8) * 2 + struct.pack(">I", 8)
    beyond = b"II*\0\x08\0\0\0\xff\xff" + struct.pack("<HHII", 0x0112, 3, 2**31, 2**32 - 1) * 50
    many = b"MM\0*\0\0\0\x08\xff\xff" + struct.pack(">HHII", 0x9286, 7, 60_000, 8) * 5000
    odd = b"MM\0*\0\0\0\x08\0\1" + struct.pack(">HHIHH", 0x0112, 3, 1, 777, 0) + bytes(4)
    picture = Image.new("RGB", (8, 8), "red")
    blocks = [circle, beyond, many, odd, b"", b"MM", bytes(65_000)]
    return [file_of(picture, form, exif=b"Exif\0\0" + block) for form in ("JPEG", "PNG", "WEBP") for block in blocks]


def _cut(chance: random.Random) -> bytes:
    data = chance.choice(good())
    return data[: chance.randrange(len(data))]


def _cut_exotic(chance: random.Random) -> bytes:
    data = chance.choice(exotic_files())
    return data[: chance.randrange(len(data) + 1)] if chance.random() < 0.5 else data


def _noise(chance: random.Random) -> bytes:
    """Random bytes, half of them after a good beginning."""
    noise = chance.randbytes(chance.choice([1, 10, 1000, 50_000]))
    return noise if chance.random() < 0.5 else chance.choice(good() + moving())[: chance.randrange(4, 40)] + noise


def _one_of(files: Callable[[], list[bytes]]) -> Callable[[random.Random], bytes]:
    return lambda chance: chance.choice(files())


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    "bomb": _one_of(bombs),
    "moving bomb": _one_of(moving_bombs),
    "costly": _one_of(costly_files),
    "stuffed": _one_of(stuffed_files),
    "cut short": _cut,
    "damaged": lambda chance: damaged_picture(chance, chance.choice(good())),
    "damaged clip": lambda chance: damaged_picture(chance, chance.choice(moving())),
    "damaged EXIF": lambda chance: damaged_picture(chance, chance.choice(exif_files())),
    "exotic format": _cut_exotic,
    "no picture": _one_of(other_files),
    "noise": _noise,
}
NEVER_DRAWN = {"exotic format", "no picture"}
