"""The files of the journal: segments, their salts, their limits, and what is carried into each."""

import collections

from span_samples import identity, record

from clrk.gateway.telemetry import journal as journal_module
from clrk.gateway.telemetry.journal import Journal
from clrk.gateway.telemetry.pipeline import Telemetry
from clrk.gateway.telemetry.store import TraceStore


def test_text_that_looks_like_a_frame_is_none_in_a_segment_with_another_salt(tmp_path):
    first = Journal(tmp_path / "a", collections.Counter())
    first.append(b"payload")
    forged = next(iter((tmp_path / "a").iterdir())).read_bytes()[20:]
    second = Journal(tmp_path / "b", collections.Counter())
    second.append(b"x")
    end = second.end
    path = next(iter((tmp_path / "b").iterdir()))
    path.write_bytes(path.read_bytes() + forged)
    assert [position for position, _ in second.frames(end.segment)] == [end]
    first.close()
    second.close()


def test_segments_follow_each_other_and_go_when_they_are_applied(tmp_path):
    journal = Journal(tmp_path, collections.Counter(), segment_bytes=1000)
    journal.begin("open", b"begun")
    positions = [journal.append(bytes([65 + number]) * 300) for number in range(12)]
    assert positions == sorted(positions)
    assert len(list(tmp_path.iterdir())) == 4
    found = [payload for number in range(1, 5) for _, payload in journal.frames(number)]
    assert [payload for payload in found if payload != b"begun"] == [bytes([65 + n]) * 300 for n in range(12)]
    assert found.count(b"begun") == 4, "carried into each segment"
    for path in journal.behind(positions[-1]):
        path.unlink()
    (left,) = tmp_path.iterdir()
    assert journal.size_bytes == left.stat().st_size
    assert b"begun" in left.read_bytes()
    journal.end_of("open")
    for _ in range(4):
        journal.append(b"z" * 300)
    assert b"begun" not in max(tmp_path.iterdir()).read_bytes()
    journal.close()
    again = Journal(tmp_path, collections.Counter(), above=3)
    assert again.start > journal.end
    assert Journal(tmp_path / "none", collections.Counter(), above=77).start.segment == 78


def test_the_journal_has_a_limit_and_says_so(tmp_path):
    counters = collections.Counter()
    journal = Journal(tmp_path, counters, segment_bytes=1000, max_bytes=5000)
    taken = [journal.append(b"x" * 400) for _ in range(30)]
    assert 0 < sum(position is not None for position in taken) < 30
    assert counters["journal_refused"] == sum(position is None for position in taken)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) <= 5000
    journal.close()


def test_open_spans_are_bounded_too(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "MAX_OPEN_BYTES", 1000)
    counters = collections.Counter()
    journal = Journal(tmp_path, counters)
    for number in range(50):
        journal.begin(str(number), b"x" * 100)
    assert counters["journal_open_forgotten"] == 40
    journal.close()


async def test_applied_segments_are_deleted_while_we_run(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_module, "SEGMENT_BYTES", 10_000)
    store = TraceStore(tmp_path / "traces.db", retention_s=1e6)
    store._writer._journal._segment_bytes = 10_000
    for _ in range(10):
        for _ in range(20):
            record(Telemetry(store, {}), identity())
        assert await store.flush()
    assert len(list((tmp_path / "journal").iterdir())) <= 2
    assert store.journal_bytes < 40_000
    await store.close()
