"""HTTP/1.1 heads and bodies: one verdict however the bytes arrive, and none that a strict reader would contradict."""

from __future__ import annotations

import h11
from splits import ways_to_arrive

from clrk.core.errors import ProtocolError
from clrk.gateway.egress.hidden_http import FirstLine, HiddenHttpError
from clrk.gateway.egress.http1 import (
    ChunkedBody,
    HeadReader,
    parse_request,
    parse_response,
    render_head,
    render_last_chunk,
    request_body,
)

Verdict = tuple[object, ...]


def http1_request(data: bytes) -> None:
    """Every way to arrive ends in the verdict of the whole; what is accepted, h11 reads the same or refuses."""
    verdicts = {_read_request(pieces) for pieces in ways_to_arrive(data)}
    assert len(verdicts) == 1, verdicts
    (verdict,) = verdicts
    if verdict[0] == "message":
        _agree_with_h11(data, *verdict[1:])


def http1_response(data: bytes) -> None:
    """Every way to arrive ends in the same response head; what is written of it reads the same again."""
    verdicts = {_read_response(pieces) for pieces in ways_to_arrive(data)}
    assert len(verdicts) == 1, verdicts


def http1_chunked(data: bytes) -> None:
    """A chunked body, of a request and of a response: the same bytes, trailers and rest, or the same error."""
    for of_request in (True, False):
        verdicts = {_read_chunks(pieces, of_request=of_request) for pieces in ways_to_arrive(data)}
        assert len(verdicts) == 1, verdicts


def _read_request(pieces: list[bytes]) -> Verdict:
    reader, request, body, read = HeadReader(), None, None, b""
    rest = b""
    try:
        for data in pieces:
            piece = data
            if request is None:
                if (found := reader.feed(piece)) is None:
                    continue
                request = parse_request(found[0])
                body, piece = request_body(request), found[1]
            if body.done:
                rest += piece
            else:
                read += body.feed(piece)
                rest += body.rest
    except ProtocolError as exc:
        return (exc.code,)
    if request is None or body is None or not body.done:
        return ("more",)
    return "message", request.method, request.target, request.headers, read, body.trailers, rest


def _agree_with_h11(
    data: bytes, method: str, target: str, headers: tuple, body: bytes, trailers: tuple, rest: bytes
) -> None:  # fmt: skip
    oracle = h11.Connection(h11.SERVER, max_incomplete_event_size=2**20)
    oracle.receive_data(data)
    read, event = b"", None
    try:
        event = oracle.next_event()
        if not isinstance(event, h11.Request) or method == "CONNECT":
            return
        assert (event.method, event.target) == (method.encode("latin-1"), target.encode("latin-1"))
        while isinstance(event := oracle.next_event(), h11.Data):
            read += bytes(event.data)
    except h11.RemoteProtocolError:
        return  # stricter than we are about what frames nothing
    assert isinstance(event, h11.EndOfMessage), "we saw an end where h11 sees none"
    assert read == body
    assert oracle.trailing_data[0] == rest
    assert [(name.decode("latin-1"), value.decode("latin-1")) for name, value in event.headers.raw_items()] == list(
        trailers
    )  # fmt: skip


def _read_response(pieces: list[bytes]) -> Verdict:
    reader = HeadReader()
    try:
        for index, piece in enumerate(pieces):
            if (found := reader.feed(piece)) is not None:
                response = parse_response(found[0])
                raw = render_head(f"HTTP/1.{response.minor} {response.status} {response.reason}", response.headers)
                again = parse_response(raw[:-2])
                assert (again.status, again.reason, again.headers) == (
                    response.status, response.reason, response.headers,
                )  # fmt: skip
                rest = found[1] + b"".join(pieces[index + 1 :])
                return response.minor, response.status, response.reason, response.headers, rest
    except ProtocolError as exc:
        return (exc.code,)
    return ("more",)


def _read_chunks(pieces: list[bytes], *, of_request: bool) -> Verdict:
    body, read, framed, rest = ChunkedBody(of_request=of_request), b"", b"", b""
    try:
        for piece in pieces:
            if body.done:
                rest += piece
                continue
            out = body.feed(piece)
            read += out
            framed += body.framed(out)
            rest += body.rest
    except ProtocolError as exc:
        return (exc.code,)
    if not body.done:
        return "more", read
    again = ChunkedBody(of_request=of_request)
    assert again.feed(framed + render_last_chunk(body.trailers)) == read
    assert again.done
    assert again.trailers == body.trailers
    return read, framed, body.trailers, rest


def hidden_http(data: bytes) -> None:
    """A request line in a tunnel is found however it arrives, before its end goes up; what HeadReader reads is one."""
    verdicts = {_is_hidden_http(pieces) for pieces in ways_to_arrive(data)}
    assert len(verdicts) == 1, verdicts
    if _read_request([data])[0] == "message":
        assert verdicts == {True}


def _is_hidden_http(pieces: list[bytes]) -> bool:
    watch = FirstLine()
    try:
        for piece in pieces:
            if not watch.goes_on(piece):
                return False
    except HiddenHttpError:
        return True
    return False


TARGETS = {
    "http1_request": http1_request,
    "http1_response": http1_response,
    "http1_chunked": http1_chunked,
    "hidden_http": hidden_http,
}
