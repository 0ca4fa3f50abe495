"""Small shapes drawn with Pillow, as PNG bytes."""

import io

from PIL import Image, ImageDraw

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 205, 40),
    "purple": (150, 50, 180),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross")


def draw_shape(picture: Image.Image, shape: str, colour: str, x: int, y: int, radius: int) -> None:
    """Draw one shape with its middle at (x, y), in pixels."""
    pen, fill = ImageDraw.Draw(picture), COLOURS[colour]
    left, top, right, bottom = x - radius, y - radius, x + radius, y + radius
    if shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif shape == "square":
        pen.rectangle((left, top, right, bottom), fill=fill)
    elif shape == "triangle":
        pen.polygon([(x, top), (left, bottom), (right, bottom)], fill=fill)
    else:
        arm = max(1, radius // 3)
        pen.rectangle((left, y - arm, right, y + arm), fill=fill)
        pen.rectangle((x - arm, top, x + arm, bottom), fill=fill)


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
