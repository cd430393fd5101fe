"""Conversations of MCP: answers find their calls, questions their answers; and what is kept of them is bounded."""

from __future__ import annotations

from llm_exchange import post

from clrk.gateway.mcp import conversations
from clrk.gateway.mcp.conversations import Conversations, endpoint_key, session_key
from clrk.gateway.mcp.messages import Response

HEAD = post("h", "/messages")
SESSION = session_key(HEAD, "s")
ENDPOINT = endpoint_key(HEAD, "/messages", "")


def response(id_: str) -> Response:
    return Response(id_, None, "", False, None)


class Told(list[list[str | None]]):
    def __call__(self, answers) -> None:
        self.append([one.id for one in answers])


def test_all_answers_end_a_wait_once() -> None:
    one, told = Conversations(), Told()
    give_up = one.wait(one.expect(SESSION, {"1", "2"}), told)
    one.answer(SESSION, response("1"))
    one.answer(SESSION, response("1"))
    one.answer(ENDPOINT, response("2"))
    one.answer(session_key(HEAD, "other"), response("2"))
    assert told == []
    one.answer(SESSION, response("2"))
    give_up()
    one.close()
    assert told == [["1", "2"]]


def test_giving_up_tells_what_came() -> None:
    one, told = Conversations(), Told()
    give_up = one.wait(one.expect(SESSION, {"1", "2"}), told)
    one.answer(SESSION, response("2"))
    give_up()
    give_up()
    one.answer(SESSION, response("1"))
    assert told == [["2"]]


def test_the_last_stream_of_http_with_sse_ends_its_waits() -> None:
    one, told, other = Conversations(), Told(), Told()
    one.wait(one.expect(ENDPOINT, {"1"}), told)
    one.wait(one.expect(SESSION, {"1"}), other)
    for key in (ENDPOINT, ENDPOINT, SESSION):
        one.open_stream(key)
    assert one.is_endpoint(HEAD)
    assert not one.is_endpoint(post("h", "/other"))
    one.close_stream(ENDPOINT)
    assert told == []
    one.close_stream(ENDPOINT)
    one.close_stream(SESSION)  # it may be resumed
    assert (told, other) == ([[]], [])
    assert not one.is_endpoint(HEAD)
    one.close()
    assert other == [[]]


def test_an_id_that_is_used_again_ends_the_first_wait() -> None:
    one, first, second = Conversations(), Told(), Told()
    one.wait(one.expect(SESSION, {"1", "2"}), first)
    one.wait(one.expect(SESSION, {"1"}), second)
    assert first == [[]]
    one.answer(SESSION, response("2"))
    one.answer(SESSION, response("1"))
    assert (first, second) == ([[]], [["1"]])


def test_waits_are_bounded(monkeypatch) -> None:
    monkeypatch.setattr(conversations, "MAX_WAITING", 3)
    one, told = Conversations(), [Told() for _ in range(5)]
    for at, tell in enumerate(told):
        one.wait(one.expect(SESSION, {str(at)}), tell)
    assert [len(tell) for tell in told] == [1, 1, 0, 0, 0]


def test_questions_are_bounded_and_answered_once(monkeypatch) -> None:
    monkeypatch.setattr(conversations, "MAX_QUESTIONS", 3)
    one = Conversations()
    for at in range(5):
        one.ask(SESSION, str(at), f"m{at}")
    assert [one.question(SESSION, str(at)) for at in range(5)] == [None, None, "m2", "m3", "m4"]
    assert one.question(SESSION, "4") is None
    one.ask(SESSION, "1", "m")
    assert one.question(ENDPOINT, "1") is None


def test_keys_are_bounded() -> None:
    assert len(session_key(HEAD, "s" * 9999)[2]) == len(endpoint_key(HEAD, "/" * 9999, "")[2]) == 512


def test_an_answer_may_come_before_anybody_waits() -> None:
    one = Conversations()
    expected = one.expect(SESSION, {"1", "2"})
    one.answer(SESSION, response("1"))
    one.answer(SESSION, response("2"))
    assert (expected.missing, [found.id for found in expected.answers]) == (set(), ["1", "2"])


def test_what_is_given_up_before_anybody_waits_tells_nobody() -> None:
    one, told = Conversations(), Told()
    expected = one.expect(SESSION, {"1"})
    one.give_up(expected)
    one.wait(one.expect(SESSION, {"1"}), told)
    one.give_up(expected)
    assert told == []
