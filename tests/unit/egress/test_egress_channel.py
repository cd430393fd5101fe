"""A channel whose peer is gone before the event loop has heard of it."""

import asyncio
import socket

import pytest

from clrk.gateway.egress.channel import LINGER_RESET, Channel


async def test_the_end_of_what_a_peer_has_reset_is_told_to_its_reader():
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as theirs:
        _, channel = await asyncio.get_running_loop().create_connection(Channel, sock=listener.accept()[0])
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
        theirs.close()
        channel.write_eof()
        with pytest.raises(ConnectionResetError):
            await channel.read()
        assert channel.is_broken
