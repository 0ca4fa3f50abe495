"""What is around a body, made strange: headers, content types, forms, paths, methods, queries; clients that leave."""

import gzip
import random
from functools import cache

from .fuzz_bodies import POSTED, damaged_bytes
from .fuzz_pictures import good
from .fuzz_valid import JSON, LINES, PICTURE, TEXTS, Ask, Bank, asking

CONTENT_TYPES = (
    "", "text/plain", PICTURE, "image/", "image/svg+xml", "multipart/form-data", "application/x-www-form-urlencoded",
    JSON, "APPLICATION/JSON", "application/json/json", ";", "application/problem+json", "\xff\xfe", "a" * 10_000,
    LINES, "*/*", "application/json\t; q=1", "multipart/form-data; boundary=", "application/jsonl",
)  # fmt: skip


def content_types(chance: random.Random, bank: Bank) -> Ask:
    golden = chance.choice(bank.posts)
    return asking(golden, content_type=chance.choice(CONTENT_TYPES))


def multipart(chance: random.Random, bank: Bank) -> Ask:
    """Forms: no route takes one, so all that is in them must be in vain."""
    golden = chance.choice(bank.posts)
    boundary = chance.choice(["x", "", "a" * 3000, '"', "x; boundary=y", "\xe9", "-- --"])
    part = f'--{boundary}\r\nContent-Disposition: form-data; name="inputs"; filename="{chance.choice(TEXTS)}"\r\n'
    part += chance.choice(["", "Content-Type: image/png\r\n", "X: " + "y" * 9000 + "\r\n", "no colon\r\n", "\x00\r\n"])
    content = (part + "\r\n").encode() * chance.choice([1, 3, 200]) + golden.content[:1000]
    content += chance.choice([b"", f"\r\n--{boundary}--".encode(), f"\r\n--{boundary}".encode(), b"\r\n----"])
    content = content if chance.random() < 0.7 else damaged_bytes(chance, content)
    return asking(golden, content=content, content_type=f"multipart/form-data; boundary={boundary}")


def compressed(chance: random.Random, bank: Bank) -> Ask:
    """Bodies that say they are compressed: none is to be unpacked here."""
    golden = chance.choice(bank.posts)
    content = chance.choice([gzip.compress(golden.content), golden.content, _bomb(), _bomb()[: chance.randrange(4000)]])
    encoding = chance.choice([b"gzip", b"deflate", b"br", b"zstd", b"identity", b"gzip, gzip", b"\xff", b""])
    return asking(golden, content=content, more=((b"content-encoding", encoding),))


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(50_000_000))


HEADERS: dict[bytes, tuple[bytes, ...]] = {
    b"host": (
        b"", b"evil.example", b"localhost", b"127.0.0.1:99999", b"[::1]", b"[::1", b"\xff", b"a" * 5000,
        b"127.0.0.1@x",
    ),
    b"authorization": (
        b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"Basic eDp5", b"bearer\xff\xfe", b"Bearer " + b"k" * 9000,
    ),
    b"x-request-priority": (b"low", b"normal", b"high", b"", b"HIGH", b"\xff", b"1", b"highest" * 1000),
    b"x-request-timeout-seconds": (
        b"0", b"-1", b"nan", b"inf", b"-inf", b"1e999", b"1e-9", b"0.001", b"0.05", b"5", b"", b"\xff", b"1_0",
        b"9" * 5000, b" 1 ",
    ),
    b"x-request-id": (b"", b"\xff\xfe", b"a" * 10_000, b"\xc3\xa9", b"../../etc", b"{}"),
    b"content-length": (b"0", b"-1", b"9" * 5000, b"abc", b"1", b"\xb2", b"8388609", b"1e3"),
    b"transfer-encoding": (b"chunked", b"gzip, chunked", b"nonsense"),
    b"accept": (b"text/event-stream", b"\xff", b"image/*", b"a" * 9000),
    b"origin": (b"null", b"http://evil.example", b"\xff"),
    b"cookie": (b"a=b; " * 2000, b"\xff"),
    b"expect": (b"100-continue",),
    b"range": (b"bytes=0-", b"bytes=-1,9" * 100),
    b"x-forwarded-for": (b"1.2.3.4", b"\xff"),
    b"x-http-method-override": (b"DELETE",),
    b"upgrade": (b"websocket", b"h2c"),
}  # fmt: skip


def headers(chance: random.Random, bank: Bank) -> Ask:
    golden = bank.choose(chance)
    more = []
    for _ in range(chance.randint(1, 3)):
        name = chance.choice(list(HEADERS))
        more += [(name, chance.choice(HEADERS[name]))] * chance.choice([1, 1, 1, 2])
    more += [(b"x-many-%d" % number, b"v" * 50) for number in range(chance.choice([0, 0, 0, 500]))]
    return asking(golden, more=tuple(more))


PATHS = (
    "/", "", "//", "/v1", "/v1/", "/v1/classify/", "//v1/classify", "/v1/../v1/tag", "/v1/classify\x00",
    "/V1/CLASSIFY", "/v1/\ufffd", "/v1/models/", "/v1/models/none", "/v1/models/\x00", "/v1/models/a/b",
    "/v1/models/" + "x" * 8000, "/v1/models/mood", "/docs", "/openapi.json", "/docs/oauth2-redirect", "/redoc",
    "/static-offline-docs/../app.py", "/static-offline-docs/\x00", "/static-offline-docs/" + "x" * 5000,
    "/static-offline-docs/", "/static-offline-docs/swagger-ui.css", "/favicon.ico", "/😀", "/metrics", "/readyz",
    "/healthz", "/readyz/", "/v1/batch", "/v1/generate", "/-/routes", "/%2e%2e", "/v1/classify;x=1",
)  # fmt: skip
METHODS = (
    "GET", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "TRACE", "CONNECT", "post", "X" * 300, "PROPFIND",
)  # fmt: skip


def paths(chance: random.Random, bank: Bank) -> Ask:
    golden = bank.choose(chance)
    if chance.random() < 0.5:
        return asking(golden, path=chance.choice([*PATHS, *POSTED]))
    method, path = chance.choice(METHODS), chance.choice([golden.path, *PATHS])
    return asking(golden, method=method, path=path)


QUERIES = (
    b"", b"a", b"a=b&a=b", b"=", b"&&&", b"%", b"%ff%fe", b"\xff", b"max_new_tokens=1&max_new_tokens=2",
    b"max_new_tokens=nan", b"num_beams=" + b"9" * 5000, b"stream=true", b"stream=maybe", b"model=%00",
    b"model=describe", b"temperature=nan", b"do_sample=1", b"inputs=x", b"stop=a", b"stop=a&stop=b", b"seed=-1",
    b"seed=9223372036854775808", b"top_p=inf", b"a=" + b"b" * 20_000, b"a&" * 3000,
    b"num_beams=4&num_return_sequences=2", b"%ed%a0%80=1", b"prefix=%ed%a0%80", b"prefix=a", b"state=x",
    b"return_state=true", b"truncate=1", b"num_beams=1e1", b"num_beams=0x10", b"num_beams=", b"max_new_tokens=+4",
    b"__proto__=1", b"stop[]=a", b"num_beams=%D9%A4",
)  # fmt: skip


def queries(chance: random.Random, bank: Bank) -> Ask:
    """Half of them where the query is read: beside a raw picture."""
    golden = bank.choose(chance)
    query = b"&".join(chance.sample(QUERIES, chance.randint(1, 2)))
    if chance.random() < 0.5:
        return asking(golden, query=query)
    picture = chance.choice(good())
    return asking(golden, method="POST", path="/v1/caption", content_type=PICTURE, content=picture, query=query)


def leaving(chance: random.Random, bank: Bank) -> Ask:
    """Clients that are gone before the end of the body, or before that of the answer."""
    golden = bank.choose(chance)
    return asking(golden, leaves_after=chance.randint(0, 3))
