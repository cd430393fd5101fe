"""Two governors of one exchange: neither is a way around the other."""

from __future__ import annotations

import pytest

from clrk.gateway.govern import Answer, Cut
from clrk.gateway.interpret import ResponseHead
from clrk.gateway.joint import JointGovernor

DENIAL = Answer(403, "text/plain", b"no", "no", "no")
CUT = Cut(b"<cut>", "r", "m")


class Judge:
    """Lets go what it was told to; what it passes on is marked, the last of it at the end."""

    def __init__(
        self, mark: bytes, *, verdict=None, cuts: bytes = b"", decodes: bool = False, held: bytes = b""
    ) -> None:
        self.mark, self.verdict, self.cuts, self.held = mark, verdict, cuts, held
        self.wants_plain_response = self.rewrites_response = self.decodes_response = decodes
        self.asked: list[object] = []

    def judge(self, body: bytes) -> Answer | None:
        self.asked.append(body)
        return self.verdict

    def rewrite_request(self, body: bytes) -> bytes:
        return body + self.mark

    def response_head(self, head: ResponseHead) -> None:
        self.asked.append(head.headers)

    def stream_opened(self, inject) -> None:
        pass

    def response_data(self, chunk: bytes) -> bytes | Cut:
        return CUT if self.cuts and self.cuts in chunk else chunk + self.mark

    def response_end(self, *, complete: bool) -> bytes:
        return self.held

    def settle(self, facts, *, sent: bool):
        self.asked.append(sent)
        return {self.mark.decode(): True}


class Talker(Judge):
    inject = None

    def stream_opened(self, inject) -> None:
        self.inject = inject


@pytest.mark.parametrize(("one", "other"), [(DENIAL, None), (None, DENIAL), (DENIAL, DENIAL)])
def test_what_either_denies_goes_nowhere(one, other) -> None:
    assert JointGovernor(Judge(b"1", verdict=one), Judge(b"2", verdict=other)).judge(b"x") is DENIAL


def test_what_the_first_denies_is_judged_by_the_second_too_since_a_gateway_may_only_watch() -> None:
    first, second = Judge(b"1", verdict=DENIAL), Judge(b"2")
    joint = JointGovernor(first, second)
    assert joint.judge(b"x") is DENIAL
    assert second.asked == [b"x"]
    assert joint.settle(None, sent=True) == {"1": True, "2": True}


def test_both_are_asked_and_both_settle() -> None:
    first, second = Judge(b"1"), Judge(b"2")
    joint = JointGovernor(first, second)
    assert joint.judge(b"x") is None
    assert joint.rewrite_request(b"x") == b"x12"
    assert joint.settle(None, sent=True) == {"1": True, "2": True}
    assert first.asked == second.asked == [b"x", True]


def test_the_second_sees_what_the_first_lets_through() -> None:
    joint = JointGovernor(Judge(b"1", cuts=b"a"), Judge(b"2", cuts=b"b1"))
    assert joint.response_data(b"x") == b"x12"
    assert joint.response_data(b"a") is CUT
    assert joint.response_data(b"b") is CUT


def test_what_was_held_is_seen_by_the_second_too() -> None:
    assert JointGovernor(Judge(b"1", held=b"h"), Judge(b"2", held=b"t")).response_end(complete=True) == b"h2t"
    assert JointGovernor(Judge(b"1", held=b"h"), Judge(b"2", cuts=b"h")).response_end(complete=True) == Cut(
        b"<cut>", "r", "m"
    )
    assert JointGovernor(Judge(b"1"), Judge(b"2", held=b"t")).response_end(complete=False) == b"t"


def test_what_the_first_decodes_is_plain_to_the_second() -> None:
    first, second = Judge(b"1", decodes=True), Judge(b"2")
    joint = JointGovernor(first, second)
    joint.response_head(ResponseHead(200, (("A", "b"), ("content-Encoding", "gzip"))))
    assert second.asked == [(("A", "b"),)]
    assert joint.decodes_response
    assert joint.rewrites_response
    assert joint.wants_plain_response


def test_only_the_first_talks() -> None:
    first, second = Talker(b"1"), Talker(b"2")
    JointGovernor(first, second).stream_opened(lambda _: True)
    assert first.inject is not None
    assert second.inject is None
    JointGovernor(Judge(b"1"), second).stream_opened(lambda _: True)
    assert second.inject is None


def test_one_that_fails_to_settle_leaves_nothing_held_by_the_other() -> None:
    class Broken(Judge):
        def settle(self, facts, *, sent: bool):
            raise LookupError

    other = Judge(b"2")
    with pytest.raises(LookupError):
        JointGovernor(Broken(b"1"), other).settle(None, sent=True)
    assert other.asked == [True]
