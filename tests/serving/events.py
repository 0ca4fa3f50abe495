"""Server-sent events, as a client reads them."""

import json
from typing import Any


def events(content: bytes) -> list[tuple[str | None, Any]]:
    """Name and data of each."""
    found = []
    for block in content.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        data = fields["data"]
        found.append((fields.get("event"), data if data == "[DONE]" else json.loads(data)))
    return found
