"""Picture files that the fuzz sends: good ones in every format, and small ones that ask for much."""

import io
import struct
import zlib
from functools import cache
from typing import Any

from PIL import Image


@cache
def good() -> list[bytes]:
    """One in each format, with a block of EXIF where the format has one."""
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation
    exif[0x010E] = "a description"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:01 00:00:00"
    kinds = [("RGB", "JPEG"), ("RGBA", "PNG"), ("I;16", "PNG"), ("P", "GIF"), ("RGB", "WEBP"), ("RGB", "BMP")]
    files = []
    for mode, form in kinds:
        options = {"exif": exif} if form in ("JPEG", "PNG", "WEBP") else {}
        files.append(file_of(Image.new(mode, (13, 11), 40000 if mode == "I;16" else 7), form, **options))
    return files


def file_of(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


@cache
def bombs() -> list[bytes]:
    """Small files that ask for much: pixels, frames, text."""
    many_frames = [Image.new("P", (64, 64), number % 256) for number in range(300)]
    sizes = [(13_000, 13_000), (2**31 - 1, 2**31 - 1), (0, 0), (1, 20_000_001), (60_000, 300)]
    return [
        *(_png(width, height) for width, height in sizes),
        _png(2000, 2000, zlib.compress(bytes(2001 * 2000))),  # allowed, and drawn
        _png(8, 8, zlib.compress(bytes(50_000_000))),  # much more than its size says
        _png(8, 8, text=(b"zTXt", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
        _png(8, 8, text=(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(bytes(50_000_000)))),
        _png(8, 8, text=(b"iCCP", b"a\0\0" + zlib.compress(bytes(50_000_000)))),
        _png(8, 8, text=(b"tEXt", b"a\0" + b"b" * 500_000)),
        file_of(many_frames[0], "GIF", save_all=True, append_images=many_frames[1:]),
        b"GIF89a\xff\xff\xff\xff\x80\x00\x00" + bytes(6) + b"," + struct.pack("<HHHHB", 0, 0, 65535, 65535, 0),
        b"BM" + struct.pack("<IHHIIiiHHIIiiII", 54, 0, 0, 54, 40, 2**31 - 1, -(2**31), 1, 24, 0, 0, 0, 0, 0, 0),
        file_of(Image.new("RGB", (300, 300)), "JPEG")[:400],
        b"\xff\xd8\xff\xc0\x00\x11\x08\xff\xff\xff\xff\x03\x01\x22\x00\x02\x11\x01\x03\x11\x01",
        file_of(Image.new("L", (9, 9)), "TIFF"),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4", b"PK\x03\x04", b"",
    ]  # fmt: skip


def _png(width: int, height: int, pixels: bytes = b"x\x9c", text: tuple[bytes, bytes] | None = None) -> bytes:
    """A grey PNG of any size that it says it has."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *([text] if text else [])]
    chunks += [(b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
