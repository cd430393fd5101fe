"""Which kernel headers bcc is given."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clrk.core.errors import HostError
from clrk.ebpf.kernel_headers import find_kernel_headers

RUNNING = "6.18.44-test"


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)


def debian(root: Path, *versions: str) -> None:
    for version in versions:
        (root / f"usr/src/linux-headers-{version}-amd64").mkdir(parents=True)
        (root / f"usr/src/linux-headers-{version}-common").mkdir()


def test_the_running_kernels_own_headers_come_first(tmp_path: Path) -> None:
    debian(tmp_path, "6.1.0-56")
    (tmp_path / f"lib/modules/{RUNNING}/build/include").mkdir(parents=True)
    assert find_kernel_headers(RUNNING, "x86_64", tmp_path).source is None


def test_kheaders_come_second(tmp_path: Path) -> None:
    debian(tmp_path, "6.1.0-56")
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/kheaders.tar.xz").touch()
    assert find_kernel_headers(RUNNING, "x86_64", tmp_path).source is None


def test_else_the_newest_debian_pair(tmp_path: Path) -> None:
    debian(tmp_path, "6.1.0-9", "6.1.0-56", "5.10.0-60")
    (tmp_path / "usr/src/linux-headers-7.0.0-1-amd64").mkdir()  # its -common is missing
    (tmp_path / "usr/src/linux-headers-6.1.0-99-arm64").mkdir()
    found = find_kernel_headers(RUNNING, "x86_64", tmp_path)
    assert found.source == tmp_path / "usr/src/linux-headers-6.1.0-56-common"
    assert f"-I{tmp_path}/usr/src/linux-headers-6.1.0-56-amd64/include" in found.cflags


def test_a_dangling_build_link_does_not_count(tmp_path: Path) -> None:
    debian(tmp_path, "6.1.0-56")
    (tmp_path / f"lib/modules/{RUNNING}").mkdir(parents=True)
    (tmp_path / f"lib/modules/{RUNNING}/build").symlink_to(tmp_path / "nowhere")
    assert find_kernel_headers(RUNNING, "x86_64", tmp_path).source is not None


def test_none_is_an_error_that_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="apt install linux-headers-amd64"):
        find_kernel_headers(RUNNING, "x86_64", tmp_path)


def test_the_operators_choice_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCC_KERNEL_SOURCE", "/my/headers")
    headers = find_kernel_headers(RUNNING, "x86_64", tmp_path)
    with headers.environment():
        assert os.environ["BCC_KERNEL_SOURCE"] == "/my/headers"


def test_the_environment_is_as_before_afterwards(tmp_path: Path) -> None:
    debian(tmp_path, "6.1.0-56")
    headers = find_kernel_headers(RUNNING, "x86_64", tmp_path)
    with headers.environment():
        assert os.environ["BCC_KERNEL_SOURCE"] == str(headers.source)
    assert "BCC_KERNEL_SOURCE" not in os.environ
