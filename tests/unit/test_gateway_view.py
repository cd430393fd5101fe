"""What the gateway is shown of the host, when it is restarted, and what systemd is told."""

from __future__ import annotations

import logging
import os
import socket
import sys
from pathlib import Path

import pytest

import clrk
from clrk.core.errors import HostError
from clrk.runtime import gateway_view
from clrk.runtime.gateway_process import RestartDelay, _environment
from clrk.runtime.notify import notify


def bound(arguments: list[str]) -> list[tuple[str, str]]:
    """(option, target) of every mount."""
    size = {"--ro-bind": 2, "--bind": 2}
    return [(word, arguments[at + size[word]]) for at, word in enumerate(arguments) if word in size]


def test_only_one_folder_is_writable(tmp_path):
    mounts = bound(gateway_view.bwrap_arguments(tmp_path))
    assert [target for option, target in mounts if option == "--bind"] == [str(tmp_path)]


def test_what_is_secret_on_the_host_is_not_there(tmp_path):
    targets = {target for _, target in bound(gateway_view.bwrap_arguments(tmp_path))}
    assert (
        targets & {"/", "/etc", "/root", "/home", "/run", "/var", "/etc/shadow", "/etc/clrk", "/etc/sudoers"} == set()
    )


def test_the_privileged_packages_are_not_there():
    folders = gateway_view.code_folders()
    package = Path(clrk.__path__[0])
    for name in ("runtime", "ebpf", "netns"):
        real = Path(os.path.realpath(package / name))
        assert not any(
            real.is_relative_to(folder) for folder in folders if folder != package or not (package / name).is_symlink()
        )
    assert Path(os.path.realpath(package / "gateway")) in folders
    assert Path(sys.prefix) in folders


def test_parents_of_a_mount_can_be_entered_by_everybody(tmp_path):
    arguments = gateway_view.bwrap_arguments(tmp_path)
    made = [arguments[at + 1] for at, word in enumerate(arguments) if word == "--dir"]
    for parent in list(tmp_path.parents)[:-1]:
        assert str(parent) in made


def test_capabilities_are_those_the_drop_needs(tmp_path):
    arguments = gateway_view.bwrap_arguments(tmp_path)
    kept = [arguments[at + 1] for at, word in enumerate(arguments) if word == "--cap-add"]
    assert kept == ["CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"]
    assert arguments[arguments.index("--cap-drop") + 1] == "ALL"


def test_code_that_others_can_not_read_is_refused(tmp_path, monkeypatch):
    closed = tmp_path / "checkout"
    closed.mkdir(mode=0o700)
    monkeypatch.setattr(gateway_view, "code_folders", lambda: [closed])
    with pytest.raises(HostError, match=f"can not read {closed}; run: chmod -R o.rX {closed}"):
        gateway_view.bwrap_arguments(tmp_path)


def test_the_gateways_environment_has_nothing_of_the_runtimes(tmp_path):
    environ = {
        "AWS_SECRET_ACCESS_KEY": "x",
        "LD_PRELOAD": "x",
        "PYTHONPATH": "x",
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=x",
        "CLRK_GATEWAY_LOG_LEVEL": "DEBUG",
        "TZ": "UTC",
    }
    assert _environment(tmp_path, environ) == {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "LANG": "C.UTF-8",
        "HOME": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "CLRK_GATEWAY_LOG_LEVEL": "DEBUG",
        "TZ": "UTC",
    }


def test_restart_is_immediate_then_slower_then_forgiven():
    delay = RestartDelay()
    assert [delay.after(0.1) for _ in range(9)] == [0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]
    assert delay.after(10.0) == 0.0
    assert delay.after(0.1) == 0.5


@pytest.mark.parametrize("abstract", [False, True])
def test_notify(tmp_path, abstract):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        path = str(tmp_path / "n")
        supervisor.bind("\0" + path if abstract else path)
        supervisor.settimeout(5)
        notify("READY=1", {"NOTIFY_SOCKET": "@" + path if abstract else path})
        assert supervisor.recv(100) == b"READY=1"


def test_notify_without_a_supervisor_does_nothing(tmp_path, caplog):
    notify("READY=1", {})
    assert caplog.records == []
    notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "gone")})
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
