"""Output of agents as log lines: what is a line, and where it stops."""

import asyncio
import os

import pytest

from clrk.gateway.output_log import MAX_BYTES, MAX_LINE_BYTES, MAX_LINES, LogAllowance, LoggedPipe, OutputLog


class Log(OutputLog):
    """Remembers the lines."""

    def __init__(self, allowance=None):
        self.lines = []
        super().__init__(self.lines.append, allowance or LogAllowance())


@pytest.mark.parametrize(
    ("chunks", "lines"),
    [
        ([b"one\ntwo\n"], [b"one", b"two"]),
        ([b"on", b"e\ntw", b"o"], [b"one", b"two"]),
        ([b"\n\n"], [b"", b""]),
        ([b"a\r\nb"], [b"a\r", b"b"]),
        ([], []),
        ([b"\xff\x00\n"], [b"\xff\x00"]),
        ([b"x" * (MAX_LINE_BYTES + 1) + b"\n"], [b"x" * MAX_LINE_BYTES, b"x"]),
        ([b"x" * 10_000] * 3, [b"x" * MAX_LINE_BYTES, b"x" * (20_000 - MAX_LINE_BYTES), b"x" * 10_000]),
    ],
)
def test_lines(chunks, lines):
    log = Log()
    for chunk in chunks:
        log.feed(chunk)
    log.end()
    log.end()
    assert log.lines == lines


@pytest.mark.parametrize("flood", [b"\n" * 65_536, b"x" * 65_536, b"a line\n" * 9000], ids=["empty", "endless", "many"])
def test_a_flood_ends_at_the_bound_and_is_counted(flood):
    allowance = LogAllowance()
    log, other = Log(allowance), Log(allowance)
    for _ in range(40):
        log.feed(flood)
    log.end()
    kept = sum(map(len, log.lines))
    assert kept <= MAX_BYTES + MAX_LINE_BYTES
    assert len(log.lines) <= MAX_LINES
    assert kept >= MAX_BYTES or len(log.lines) == MAX_LINES
    other.feed(b"of the other stream\n")  # the two share it
    assert other.lines == []
    newlines = len(log.lines) if b"\n" in flood else 0
    assert allowance.take_dropped() == 40 * len(flood) - kept - newlines + len(b"of the other stream\n")
    assert allowance.take_dropped() == 0


def test_a_daemons_allowance_is_new_after_a_while():
    now_s = [0.0]
    allowance = LogAllowance(600.0, lambda: now_s[0])
    log = Log(allowance)
    for _ in range(100):
        log.feed(b"x\n" * 1000)
    assert len(log.lines) == MAX_LINES
    now_s[0] = 599.0
    log.feed(b"y\n")
    assert len(log.lines) == MAX_LINES
    now_s[0] = 600.0
    log.feed(b"z\n")
    assert log.lines[MAX_LINES:] == [b"z"]


async def test_who_reads_a_logged_pipe_gets_every_byte():
    read, write = os.pipe()
    log = Log()
    pipe = LoggedPipe(read, log)
    os.write(write, b"one\ntw")
    assert await pipe.read() == b"one\ntw"
    assert log.lines == [b"one"]
    os.write(write, b"o")
    os.close(write)
    assert (await pipe.read(), await pipe.read()) == (b"o", b"")
    assert log.lines == [b"one", b"two"]
    pipe.close()


async def test_a_reader_that_leaves_early_leaves_the_last_line_too():
    read, write = os.pipe()
    log = Log()
    pipe = LoggedPipe(read, log)
    os.write(write, b"half")
    async with asyncio.timeout(25):
        await pipe.read()
    pipe.close()
    os.close(write)
    assert log.lines == [b"half"]
