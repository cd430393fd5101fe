"""Generated HTTP exchanges: what is asked, what is answered, and when each byte of it may go. Seeded; no I/O.

Shape: an exchange is two messages in wire bytes, each cut into bursts. Who sends a burst waits, before the next one,
until the other end has read every body byte of those before: whatever holds a byte back stops the exchange.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from random import Random

NAME = "tools.internal"
METHODS = "GET GET GET GET POST POST POST POST PUT PATCH DELETE HEAD HEAD OPTIONS REPORT QUERY M-SEARCH".split()
TARGETS = ["/", "/a/../b?x=1&&y=%2f?", "/%C3%A9;v=1", "/?", "//double", "/a%00b", "/" + "long/" * 300, "/a?b"]
STATUSES = ["200 OK"] * 8 + [
    "201 Created", "202 ", "203 Non-Authoritative Information", "206 Partial Content", "301 Moved", "400 Bad",
    "404 Not Found", "418 I'm a teapot", "429 Too Many Requests", "500 Oops", "503 Unavailable", "299 Odd \xe9",
    "599 ~", "204 No Content", "204 No Content", "304 Not Modified", "304 Not Modified",
]  # fmt: skip
NAMES = [
    "X-A", "x-a", "X-b", "Cookie", "Set-Cookie", "set-cookie", "Vary", "ETag", "WWW-Authenticate", "x_under", "X.dot",
    "Via", "Date", "Server", "Link", "X-Very-" + "Long-" * 20 + "Name", "Accept", "Accept-Encoding", "If-None-Match",
    "Trailer", "Pragma", "Warning", "Age", "Forwarded", "X-Forwarded-For", "Priority", "Range", "Content-Range",
]  # fmt: skip
TRAILER_NAMES = ["X-T", "x-t", "X-Sum", "Server-Timing"]
VALUES = [
    "", "1", "a=b; Path=/", 'W/"x"', "bytes=0-4", "bytes 0-4/10", "x" * 300, "comma, separated, values", "tab\tinside",
    "caf\xe9", '"quoted, string"', "~!@#$%^&*()", "a  b", "gzip, br;q=0.5",
]  # fmt: skip
INTERIMS = ["103 Early Hints", "102 Processing", "110 "]


@dataclass(frozen=True)
class Message:
    """One message on the wire. Shape: needed[k] is how many body bytes the reader has seen when burst k may follow."""

    head: bytes
    bursts: tuple[bytes, ...]
    needed: tuple[int, ...]


@dataclass(frozen=True)
class Exchange:
    """One request and its answer.

    Shape: early is the number of request bursts after which the answer begins. ending is keep (the connection goes on),
        close (it ends after a whole answer), fin or reset (in the middle of the answer).
    """

    number: int
    method: str
    request: Message
    response: Message
    interims: tuple[bytes, ...] = ()
    expects: bool = False
    continues: bool = True
    early: int | None = None
    ending: str = "keep"
    is_open_ended: bool = False
    facts: dict[str, object] = field(default_factory=dict, compare=False)


def connections(seed: int, exchanges: int) -> list[list[Exchange]]:
    """Return exchanges, in the connections that carry them one after the other."""
    random = Random(seed)
    found: list[list[Exchange]] = []
    number = 0
    while number < exchanges:
        group: list[Exchange] = []
        for _ in range(random.choice([1, 1, 2, 3, 5])):
            group.append(_exchange(random, seed * 100_000 + number))
            number += 1
            if group[-1].ending != "keep" or number == exchanges:
                break
        found.append(group)
    return found


def _exchange(random: Random, number: int) -> Exchange:
    method, target, status = random.choice(METHODS), random.choice(TARGETS), random.choice(STATUSES)
    has_body = method not in ("GET", "HEAD", "OPTIONS") or random.random() < 0.05
    framing = random.choice(["length", "chunked"]) if has_body else "none"
    expects = has_body and random.random() < 0.15
    continues = not expects or random.random() < 0.6
    asks_close = random.random() < 0.1
    answer = random.choice(["length", "length", "chunked", "chunked", "chunked", "close", "old"])
    is_open_ended, bodiless = answer in ("close", "old"), method == "HEAD" or status[:3] in ("204", "304")
    ending = random.choice(["keep"] * 6 + ["close", "fin", "reset"])
    if not continues or (bodiless and ending != "keep") or (ending == "keep" and (is_open_ended or asks_close)):
        ending = "close"
    extra = [("X-Exchange", str(number)), *([("Expect", "100-continue")] if expects else [])]
    extra += [(random.choice(["Connection", "connection"]), "close")] if asks_close else []
    extra += [("TE", "trailers")] if random.random() < 0.1 else []
    request = _message(random, f"{method} {target} HTTP/1.1", [("hOsT", NAME), *extra], framing)
    early = None
    if not expects and not is_open_ended and len(request.bursts) > 1 and random.random() < 0.3:
        early = random.randrange(1, len(request.bursts))
    hop = [("Connection", "close")] if ending == "close" and answer != "old" else []
    hop += [("Keep-Alive", "timeout=5")] if random.random() < 0.1 else []
    hop += [("Alt-Svc", 'h3=":443"')] if random.random() < 0.1 else []
    version, broken = "1.0" if answer == "old" else "1.1", ending in ("fin", "reset")
    told = "none" if status[:3] == "204" else "close" if answer == "old" else answer
    response = _message(random, f"HTTP/{version} {status}", hop, told, bodiless=bodiless, broken=broken)
    interims = tuple(_interim(random, index) for index in range(random.choice([0, 0, 0, 0, 1, 3])))
    facts = {"target": target[:40], "status": status, "framing": (framing, answer), "ending": ending, "early": early}
    return Exchange(
        number, method, request, response, interims, expects, continues, early, ending, is_open_ended, facts
    )  # fmt: skip


def _interim(random: Random, index: int) -> bytes:
    return f"HTTP/1.1 {random.choice(INTERIMS)}\r\nLink: </{index}>\r\nlink: </b>\r\n\r\n".encode()


def _message(
    random: Random, line: str, headers: list[tuple[str, str]], framing: str, *, bodiless: bool = False,
    broken: bool = False,
) -> Message:  # fmt: skip
    """Return a message; bodiless keeps the header that frames a body and has none."""
    fields = [*headers, *_fields(random, random.choice([0, 1, 3, 8]), NAMES)]
    sizes = [random.choice([1, 2, 17, 300, 300, 4096, 70_000]) for _ in range(random.choice([0, 1, 1, 2, 3, 6]))]
    pieces = [random.randbytes(size) for size in sizes or ([300] if broken else [])]
    trailers = _fields(random, random.choice([0, 0, 1, 3]), TRAILER_NAMES)
    if framing == "length":
        fields.append((random.choice(["Content-Length", "content-length"]), str(sum(map(len, pieces)))))
    elif framing == "chunked":
        fields.append((random.choice(["Transfer-Encoding", "transfer-encoding"]), "chunked"))
    random.shuffle(fields)
    head = "\r\n".join([line, *(f"{name}: {value}" for name, value in fields), "", ""]).encode("latin-1")
    if bodiless or framing == "none":
        return Message(head, (), ())
    return Message(head, *_cut(random, _wire(pieces, framing, trailers), broken=broken))


def _fields(random: Random, count: int, names: list[str]) -> list[tuple[str, str]]:
    return [(random.choice(names), random.choice(VALUES)) for _ in range(count)]


def _wire(pieces: list[bytes], framing: str, trailers: list[tuple[str, str]]) -> list[tuple[bytes, int]]:
    """Return the body's bytes in parts, each with the number of body bytes that it holds."""
    if framing != "chunked":
        return [(piece, len(piece)) for piece in pieces]
    found: list[tuple[bytes, int]] = []
    for piece in pieces:
        found += [(b"%x\r\n" % len(piece), 0), (piece, len(piece)), (b"\r\n", 0)]
    end = "".join(f"{name}: {value}\r\n" for name, value in trailers).encode("latin-1")
    return [*found, (b"0\r\n" + end + b"\r\n", 0)]


def _cut(random: Random, parts: list[tuple[bytes, int]], *, broken: bool) -> tuple[tuple[bytes, ...], tuple[int, ...]]:
    """Cut a body anywhere; a broken one ends before its last byte."""
    wire = b"".join(part for part, _ in parts)
    if broken:
        wire = wire[: random.randrange(len(wire))]
    places = sorted({0, len(wire), *(random.randrange(len(wire) + 1) for _ in range(random.choice([0, 1, 3, 6])))})
    bursts = [wire[start:end] for start, end in pairwise(places)]
    needed: list[int] = []
    for end in places[1:]:
        at = read = 0
        for part, size in parts:
            read += min(size, max(0, end - at))
            at += len(part)
        needed.append(read)
    return tuple(bursts), tuple(needed)
