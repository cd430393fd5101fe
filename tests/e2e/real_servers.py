"""Debian's own servers on loopback, for the time of a test: OpenSSH, aiosmtpd, MariaDB, PostgreSQL, Redis.

`packaging/setup.sh --tests` installs them. Each runs from a folder of its own, as a user without power, on a free port,
and is ended by its pid.
"""

from __future__ import annotations

import contextlib
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from instances import DEADLINE_S, instance
from stack import free_port

PASSWORD = "opensesame"
# Exists with a shell where PostgreSQL is installed: an sshd without power lets its own user in, and nobody else.
USER = "postgres"

_SMTP = """
import asyncio, json, ssl, sys
from aiosmtpd.smtp import SMTP
port, certificate, kind = int(sys.argv[1]), sys.argv[2], sys.argv[3]
context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
context.load_cert_chain(certificate)

class Keep:
    async def handle_DATA(self, server, session, envelope):
        facts = {'to': envelope.rcpt_tos, 'tls': session.ssl is not None, 'size': len(envelope.content)}
        print(json.dumps(facts), flush=True)
        return '250 kept'

def smtp():
    return SMTP(Keep(), hostname='smtp.internal', tls_context=context if kind == 'starttls' else None)

async def main():
    wrapped = context if kind == 'tls' else None
    server = await asyncio.get_running_loop().create_server(smtp, '127.0.0.1', port, ssl=wrapped)
    await server.serve_forever()

asyncio.run(main())
"""


@dataclass(frozen=True)
class Server:
    """One server: where it listens, its folder, and what it wrote."""

    port: int
    folder: Path

    @property
    def address(self) -> str:
        """ip:port, as hostAliases has it."""
        return f"127.0.0.1:{self.port}"

    def log(self) -> str:
        """What it wrote."""
        return (self.folder / "log").read_text(errors="replace")


@contextlib.contextmanager
def home() -> Iterator[Path]:
    """A folder that the server's user owns, and that sandboxes can read."""
    folder = Path(tempfile.mkdtemp(prefix=f"{instance('sv')}-"))
    try:
        owner = pwd.getpwnam(USER)
        shutil.chown(folder, owner.pw_uid, owner.pw_gid)
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder)


def as_user(*command: object) -> list[str]:
    """The command without root's power, and dead with its parent."""
    return [
        "setpriv", "--reuid", USER, "--regid", USER, "--clear-groups", "--pdeathsig", "KILL", "--", *map(str, command),
    ]  # fmt: skip


@contextlib.contextmanager
def running(server: Server, *command: object, stdin: bytes = b"") -> Iterator[Server]:
    """Run a server until the test is over; it is ready when it accepts."""
    source = server.folder / "stdin"
    source.write_bytes(stdin)
    with (server.folder / "log").open("wb") as log, source.open("rb") as given:
        process = subprocess.Popen(as_user(*command), stdin=given, stdout=log, stderr=log, cwd=server.folder)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not accepts(server.port):
            assert process.poll() is None, server.log()
            assert time.monotonic() < deadline, server.log()
            time.sleep(0.05)  # a foreign program: there is nothing else to wait for
        yield server
    finally:
        process.terminate()
        try:
            process.wait(DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def accepts(port: int) -> bool:
    """Say whether somebody listens."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def openssh() -> Iterator[Server]:
    """sshd; `id` in its folder is the key that it lets in, `known_hosts` names it ssh.internal."""
    with home() as folder:
        for name in ("id", "host"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        shutil.chown(folder / "host", USER)
        (folder / "id").chmod(0o644)  # ssh minds the mode of its own user's keys only
        (folder / "known_hosts").write_text(f"ssh.internal {(folder / 'host.pub').read_text()}")
        server = Server(free_port(), folder)
        options = {
            "ListenAddress": server.address, "HostKey": folder / "host", "AuthorizedKeysFile": folder / "id.pub",
            "PidFile": "none", "UsePAM": "no", "StrictModes": "no", "PasswordAuthentication": "no",
            "KbdInteractiveAuthentication": "no",
        }  # fmt: skip
        given = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        with running(server, "/usr/sbin/sshd", "-D", "-e", "-f", "/dev/null", *given):
            yield server


@contextlib.contextmanager
def smtp(certificate: Path, kind: str) -> Iterator[Server]:
    """A mail server; kind is starttls, or tls from the first byte. Its log has one JSON line a mail."""
    with home() as folder:
        mine = folder / "server.pem"
        shutil.copy(certificate, mine)
        shutil.chown(mine, USER)
        server = Server(free_port(), folder)
        with running(server, "/usr/bin/python3", "-I", "-c", _SMTP, server.port, mine, kind):
            yield server


@contextlib.contextmanager
def mariadb() -> Iterator[Server]:
    """MariaDB with a user `app`."""
    with home() as folder:
        data = folder / "data"
        command = ["mariadb-install-db", "--no-defaults", f"--datadir={data}", "--skip-test-db"]
        subprocess.run(as_user(*command), check=True, capture_output=True, cwd=folder)
        start = folder / "start.sql"
        grants = ("CREATE DATABASE lamps", f"CREATE USER app IDENTIFIED BY '{PASSWORD}'", "GRANT ALL ON lamps.* TO app")
        start.write_text("".join(f"{statement};\n" for statement in grants))  # one a line
        server = Server(free_port(), folder)
        options = [f"--datadir={data}", f"--socket={folder}/s", f"--init-file={start}", "--bind-address=127.0.0.1"]
        small = ["--skip-name-resolve", "--innodb-buffer-pool-size=16M", "--performance-schema=OFF", "--skip-log-bin"]
        with running(server, "/usr/sbin/mariadbd", "--no-defaults", f"--port={server.port}", *options, *small):
            yield server


@contextlib.contextmanager
def postgresql(certificate: Path) -> Iterator[Server]:
    """PostgreSQL with a user `app`, with and without TLS."""
    with home() as folder:
        binaries = max(Path("/usr/lib/postgresql").glob("*/bin"))
        password, data = folder / "password", folder / "data"
        password.write_text(PASSWORD + "\n")
        options = ["-U", "app", "-A", "scram-sha-256", f"--pwfile={password}", "--no-sync", "-E", "UTF8", "--locale=C"]
        subprocess.run(as_user(binaries / "initdb", "-D", data, *options), check=True, capture_output=True, cwd=folder)
        mine = data / "server.pem"
        shutil.copy(certificate, mine)
        shutil.chown(mine, USER)
        mine.chmod(0o600)
        server = Server(free_port(), folder)
        settings = {
            "listen_addresses": "127.0.0.1", "port": server.port, "unix_socket_directories": "", "fsync": "off",
            "ssl": "on", "ssl_cert_file": mine, "ssl_key_file": mine, "shared_buffers": "1MB",
        }  # fmt: skip
        given = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with running(server, binaries / "postgres", "-D", data, *given):
            yield server


@contextlib.contextmanager
def redis() -> Iterator[Server]:
    """Redis with a password."""
    with home() as folder:
        server = Server(free_port(), folder)
        options = f"port {server.port}\nbind 127.0.0.1\nsave ''\ndir {folder}\nrequirepass {PASSWORD}\n"
        with running(server, "/usr/bin/redis-server", "-", stdin=options.encode()):
            yield server
