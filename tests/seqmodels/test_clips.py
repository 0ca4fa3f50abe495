"""Clips: one animated file is its frames as they are displayed; a directory is read in the order of its names."""

import io
import random
import struct
import time
import zlib
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image, ImageDraw

from seqmodels.clips import extent, frame_files
from seqmodels.errors import InputError, TooLongError
from seqmodels.pipeline import Pipeline
from seqmodels.preprocessing import Preprocessor
from tests.seqmodels.conftest import png

SIZE = 24
WHITE = 1.0  # as the preprocessor gives it, with mean and std of 0.5
SHOWN = Preprocessor(size=(SIZE, SIZE))


def drawn(count: int = 5, back: str = "navy") -> list[Image.Image]:
    """A square that goes to the right, in few colours, so that every format keeps them."""
    frames = []
    for number in range(count):
        frame = Image.new("RGBA" if back == "#0000" else "RGB", (SIZE, SIZE), back)
        ImageDraw.Draw(frame).rectangle((3 * number, 4, 3 * number + 5, 9), fill="orange")
        frames.append(frame)
    return frames


def animated(frames: list[Image.Image], kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    lossless = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=50, **lossless, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
@pytest.mark.parametrize("channels", [1, 3])
def test_an_animated_file_is_its_frames(kind: str, channels: Literal[1, 3]) -> None:
    """Files store only what changes between frames; what is read is what would be seen."""
    preprocessor, frames = Preprocessor(size=(10, 12), channels=channels), drawn()
    read = preprocessor.frames(animated(frames, kind))
    assert torch.equal(read, preprocessor.frames(frames))
    assert not any(torch.equal(a, b) for a, b in pairwise(read))
    assert extent(animated(frames, kind)) == (5, SIZE * SIZE)
    assert torch.equal(preprocessor.frames(preprocessor.split(animated(frames, kind))), read)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_what_an_animated_file_leaves_transparent_is_white(kind: str) -> None:
    disposal = {"GIF": {"disposal": 2}, "PNG": {"disposal": 1}}.get(kind, {})
    read = SHOWN.frames(animated(drawn(3, "#0000"), kind, **disposal))
    assert torch.equal(read, SHOWN.frames(drawn(3, "white")))
    assert (read[:, :, 0] == WHITE).all()
    assert torch.equal(SHOWN.frames(SHOWN.split(animated(drawn(3, "#0000"), kind, **disposal))), read)


def test_frames_of_a_file_are_written_as_every_library_would_write_them() -> None:
    """What is trained on is told apart by its bytes: pixels at the model's size, behind a header."""
    small = Preprocessor(size=(4, 5))
    first, *_ = small.split(animated(drawn(2), "WEBP"))
    rows = first[54:]  # of 5 pixels in 16 bytes, from the bottom up, blue first
    pixels = list(drawn(2)[0].resize((5, 4)).getdata())
    assert first[:2] == b"BM" and len(rows) == 4 * 16
    assert [tuple(rows[16 * y + 3 * x : 16 * y + 3 * x + 3][::-1]) for y in (3, 2, 1, 0) for x in range(5)] == pixels


def test_a_cover_is_no_frame() -> None:
    """An animated PNG may begin with a picture for programs that show no animations."""
    cover, *frames = drawn(4)
    with_cover = animated([cover, *frames], "PNG", default_image=True)
    assert extent(with_cover) == (3, SIZE * SIZE)
    assert torch.equal(SHOWN.frames(with_cover), SHOWN.frames(frames))
    assert torch.equal(SHOWN.frames(SHOWN.split(with_cover)), SHOWN.frames(frames))
    assert extent(animated(drawn(4), "PNG")) == (4, SIZE * SIZE)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "WEBP"])
def test_a_still_file_is_one_frame(kind: str) -> None:
    still = png(kind=kind)
    assert extent(still) == (1, 200)
    assert torch.equal(SHOWN.frames(still), SHOWN.image(still)[None])


def test_a_frame_that_is_larger_than_the_clip_counts_as_large(pipelines: dict[str, Pipeline]) -> None:
    """Pillow makes room for it, whatever the file's first bytes say."""
    file = bytearray(animated(drawn(3), "GIF"))
    places = [place for place in range(len(file) - 9) if file[place : place + 5] == b",\0\0\4\0"]
    assert places  # of a frame whose left is 0 and top is 4
    file[places[-1] + 5 : places[-1] + 9] = (9000).to_bytes(2, "little") * 2
    assert extent(bytes(file))[1] == 9000 * 9004
    with pytest.raises(InputError, match="the image has 81036000 pixels, but at most 15000000 are allowed"):
        pipelines["frames"]([{"frames": bytes(file)}])


def test_pillow_sees_no_larger_frames_than_we_count() -> None:
    """Whatever the damage: else a few bytes could have it draw on a canvas of gigabytes."""
    choose, compared = random.Random(0), 0
    whole = [
        animated(drawn(4, back), "GIF", disposal=n, loop=0, comment=b"moving")
        for back in ("navy", "#0000")
        for n in range(4)
    ]
    odd = [b"!\x01\0", b"!\xf9\0", b"!\xfe\0", b"!\xff\0", b"!\xff\x0bNETSCAPE2.0\0", b",", b"!", b";", b"\0", b"\x01a"]
    for _ in range(4000):
        data = choose.choice(whole)
        for _ in range(choose.randint(1, 4)):
            at = choose.randrange(6, len(data))
            data = data[:at] + choose.choice([*odd, choose.randbytes(1)]) + data[at + choose.randint(0, 1) :]
        count, pixels = extent(data)
        if not 0 < pixels < 10**7:
            continue
        largest = 0
        with suppress(OSError, EOFError, ValueError, IndexError), Image.open(io.BytesIO(data)) as picture:
            for number in range(count):
                picture.seek(number)
                largest = max(largest, picture.width * picture.height)
                compared += number > 0
        assert largest <= pixels, data
    assert compared > 1000


def test_a_moving_file_may_have_half_as_many_pixels(pipelines: dict[str, Pipeline]) -> None:
    """Two copies more are needed to lay frames over one another."""
    large = animated([Image.new("L", (4000, 1876), shade) for shade in (0, 9)], "GIF")
    with pytest.raises(InputError, match="a frame has 7504000 pixels, but at most 7500000 are allowed"):
        pipelines["frames"]([{"frames": large}])
    assert SHOWN.image(large).shape == (3, SIZE, SIZE)


def test_a_clip_that_is_too_long_is_refused_before_it_is_drawn(pipelines: dict[str, Pipeline]) -> None:
    """10,000 frames of 4,000 x 4,000, of which not one could be decoded."""
    head = b"GIF89a" + (4000).to_bytes(2, "little") * 2 + b"\x80\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b",\0\0\0\0" + (4000).to_bytes(2, "little") * 2 + b"\0\x02\x01\xff\0"
    clip = head + frame * 10_000 + b";"
    assert extent(clip) == (10_000, 16_000_000)
    with pytest.raises(TooLongError, match="has 10000 positions, but this model takes at most 1024"):
        pipelines["frames"]([{"frames": clip}])


def test_a_claim_of_two_billion_frames_costs_nothing(pipelines: dict[str, Pipeline]) -> None:
    claims = bytearray(animated(drawn(2), "PNG"))
    at = claims.index(b"acTL")
    claims[at + 4 : at + 8] = (2**31 - 1).to_bytes(4, "big")
    claims[at + 12 : at + 16] = zlib.crc32(claims[at : at + 12]).to_bytes(4, "big")
    with pytest.raises(TooLongError, match="has 2147483647 positions, but this model takes at most 1024"):
        pipelines["frames"]([{"frames": bytes(claims)}])


def test_a_gif_of_a_million_one_byte_blocks_is_broken() -> None:
    whole = animated(drawn(2), "GIF")
    comment = b"!\xfe" + b"\x01a" * 2**20 + b"\0"
    at = whole.index(b"!")
    started_at = time.process_time()
    assert extent(whole[:at] + comment + whole[at:]) == (0, 0)
    assert time.process_time() - started_at < 0.5
    assert extent(whole[:at] + b"!\xfe" + b"\x01a" * 2000 + b"\0" + whole[at:]) == (2, SIZE * SIZE)


def test_a_bitmap_of_many_short_runs_is_whole() -> None:
    """100,000 runs of eight equal pixels, in two bytes each."""
    width, height = 800, 1000
    rows = b"".join(bytes([8, 1 + x % 2]) for x in range(width // 8)) + b"\0\0"
    table = bytes(4) + bytes([0, 0, 255, 0]) + bytes([255, 0, 0, 0]) + bytes(4 * 253)
    pixels = rows * height + b"\0\1"
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(pixels), 0, 0, 256, 0)
    file = b"BM" + struct.pack("<IHHI", 14 + 40 + 1024 + len(pixels), 0, 0, 14 + 40 + 1024) + header + table + pixels
    colours = Image.open(io.BytesIO(file)).convert("RGB").getpixel((0, 0)), (255, 0, 0)
    assert colours[0] == colours[1]
    assert extent(file) == (1, width * height)
    assert torch.equal(SHOWN.image(file), SHOWN.image(Image.open(io.BytesIO(file))))


def test_a_file_of_a_million_empty_parts_is_broken() -> None:
    """Pillow would read it for seconds."""
    whole = png(kind="JPEG")
    stuffed = whole[:2] + b"\xff" * 2**22 + whole[2:]
    assert extent(stuffed) == (0, 0)
    with pytest.raises(InputError, match="broken or too large"):
        SHOWN.image(stuffed)
    assert SHOWN.image(whole[:2] + b"\xff" * 2000 + whole[2:]).equal(SHOWN.image(whole))


def test_an_animated_file_is_no_frame_among_others(pipelines: dict[str, Pipeline]) -> None:
    moving = animated([Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(3)], "GIF")
    with pytest.raises(InputError, match=r"frames\[1\] is a file of 3 frames; give it in place of the list") as caught:
        pipelines["frames"]([{"frames": [png(), moving]}])
    assert caught.value.param == "inputs[0].frames[1]"
    with pytest.raises(InputError, match="broken") as caught:
        pipelines["frames"]([{"frames": [png(), png(kind="JPEG")[:200]]}])
    assert caught.value.param == "inputs[0].frames[1]"


def test_a_clip_may_be_cut_to_what_the_model_takes(pipelines: dict[str, Pipeline]) -> None:
    frames = [Image.new("RGB", (8, 8), (number % 256, number // 256 * 60, 0)) for number in range(1026)]
    clip = animated(frames, "GIF")
    pipeline = pipelines["frames"]
    (cut,) = pipeline.run([pipeline.prepare({"frames": clip}, truncate=True)])
    assert cut == pipeline([{"frames": [png_of(frame) for frame in frames[:1024]]}])[0]


def png_of(frame: Image.Image) -> bytes:
    file = io.BytesIO()
    frame.save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_clip_that_is_cut_short_is_broken(kind: str, pipelines: dict[str, Pipeline]) -> None:
    whole = animated(drawn(8), kind)
    for end in range(0, len(whole), 7):
        try:
            tags = pipelines["frames"]([{"frames": whole[:end]}])[0]["tags"]
        except InputError as error:
            assert error.code in ("invalid_image", "unsupported_input"), (end, error)
        else:
            assert tags  # frames that are all there


def test_files_of_a_directory_stand_in_their_natural_order(tmp_path: Path) -> None:
    names = ["frame1.png", "frame2.PNG", "frame2b.png", "frame10.jpg", "frame010.png", "last.webp"]
    for name in [*reversed(names), "README.md", ".hidden.png"]:
        (tmp_path / name).touch()
    assert [path.name for path in frame_files(tmp_path)] == names
    with pytest.raises(InputError, match=r"holds no file that ends in one of \.jpg, \.jpeg, \.png"):
        frame_files(tmp_path.parent)
