"""A gateway that hangs ends when its runtime is gone, and not before."""

import signal
import socket
import subprocess
import sys

HANG = """
import signal, sys
from clrk.gateway.lifeline import watch_lifeline
watch_lifeline(int(sys.argv[1]), 0.05)
print("watching", flush=True)
signal.pause()
"""


def test_a_hanging_process_is_killed_when_the_far_end_closes():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with (
        theirs,
        subprocess.Popen(
            [sys.executable, "-P", "-c", HANG, str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdout=subprocess.PIPE,
        ) as process,
    ):
        theirs.close()
        assert process.stdout.readline() == b"watching\n"
        ours.send(b"unread data is no end")
        try:
            process.wait(0.3)
            raise AssertionError("it ended with the far end open")
        except subprocess.TimeoutExpired:
            ours.close()
        assert process.wait(10) == -signal.SIGKILL
