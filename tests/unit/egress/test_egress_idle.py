"""The idle clock of a channel: one timer, whatever is asked of it, and never too late nor in force when it stands."""

import asyncio
import contextlib
import socket

import pytest
import uvloop

from clrk.gateway.egress.channel import Channel

SOON_S, LATER_S = 0.02, 600.0


@contextlib.asynccontextmanager
async def connected():
    ours, theirs = socket.socketpair()
    with theirs:
        _, channel = await asyncio.get_running_loop().create_connection(Channel, sock=ours)
        yield channel, theirs
        channel.abort()


@pytest.fixture(params=[asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def run(request):
    def run(main):
        with asyncio.Runner(loop_factory=request.param) as runner:
            runner.run(main())

    return run


@pytest.mark.parametrize("before", [[], [LATER_S], [LATER_S, 0], [SOON_S, 0, LATER_S, 0], [SOON_S, LATER_S]])
def test_the_shortest_clock_that_runs_ends_it(run, before):
    async def main():
        async with connected() as (channel, _):
            for seconds in before:
                channel.set_idle_timeout(seconds)
            channel.set_idle_timeout(SOON_S)
            with pytest.raises(TimeoutError):
                await channel.read()

    run(main)


@pytest.mark.parametrize("after", [0, LATER_S])
def test_a_timer_that_comes_for_an_older_clock_does_nothing(run, after):
    async def main():
        async with connected() as (channel, theirs):
            channel.set_idle_timeout(SOON_S)
            channel.set_idle_timeout(after)
            await asyncio.sleep(SOON_S * 3)  # the timer is left running, and comes
            theirs.send(b"still here")
            assert await channel.read() == b"still here"

    run(main)


class Clock:
    """A loop's clock that is turned by hand; one timer at a time, as a channel has."""

    def __init__(self, channel):
        self._loop, self.now, self.due = channel._loop, 0.0, None
        channel._loop = self

    def time(self):
        return self.now

    def create_future(self):
        return self._loop.create_future()

    def call_later(self, seconds, callback):
        self.due, self._callback = self.now + seconds, callback
        return self._loop.call_later(LATER_S, callback)

    def turn(self, seconds):
        self.now += seconds
        if self.due is not None and self.due <= self.now:
            self.due = None
            self._callback()


def test_what_moves_puts_it_off(run):
    async def main():
        async with connected() as (channel, theirs):
            clock = Clock(channel)
            channel.set_idle_timeout(10.0)
            for _ in range(5):
                clock.turn(6.0)
                theirs.send(b"x")
                assert await channel.read() == b"x"
                clock.turn(6.0)
                channel.write_nowait(b"y")
            clock.turn(9.0)
            assert not channel.is_broken
            clock.turn(1.0)
            with pytest.raises(TimeoutError):
                await channel.read()

    run(main)


def test_an_exchange_after_the_other_starts_no_timer(run):
    """Keep-alive, request, pool and keep-alive again: the first timer serves them all."""

    async def main():
        async with connected() as (channel, _):
            channel.set_idle_timeout(30.0)
            first = channel._timer
            for _ in range(100):
                for seconds in (0, 300.0, 0, 60.0, 0, 30.0):
                    channel.set_idle_timeout(seconds)
            assert channel._timer is first

    run(main)


def test_a_channel_that_is_gone_keeps_no_timer(run):
    async def main():
        async with connected() as (channel, _):
            channel.set_idle_timeout(LATER_S)
            channel.abort()
            while channel._transport is not None:
                await asyncio.sleep(0)
            assert channel._timer is None
            channel.set_idle_timeout(LATER_S)
            assert channel._timer is None

    run(main)
