"""The Vagrantfile is one that Vagrant accepts. No machine is started, nothing is fetched."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

VAGRANTFILE = Path(__file__).parents[2] / "vagrant" / "Vagrantfile"


def _validate(folder: Path, home: Path) -> subprocess.CompletedProcess[str]:
    assert shutil.which("vagrant"), "vagrant is not installed: run `sudo make setup`"
    # HOME too: Debian's Vagrant looks for plugins there, and an unprivileged test must not write to a real one.
    environment = os.environ | {
        "HOME": str(home), "VAGRANT_HOME": str(home / "vagrant.d"), "VAGRANT_CHECKPOINT_DISABLE": "1",
    }  # fmt: skip
    # The provider's plugin is not needed to check the file, and neither is the network.
    return subprocess.run(
        ["unshare", "--map-root-user", "--net", "vagrant", "validate", "--ignore-provider"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip


def test_vagrant_accepts_the_file(tmp_path: Path) -> None:
    shutil.copy(VAGRANTFILE, tmp_path)
    found = _validate(tmp_path, tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "validated successfully" in found.stdout


def test_vagrant_refuses_a_spoilt_file(tmp_path: Path) -> None:
    text = VAGRANTFILE.read_text().replace("config.vm.hostname", "config.vm.hostnmae")
    (tmp_path / "Vagrantfile").write_text(text)
    found = _validate(tmp_path, tmp_path)
    assert found.returncode != 0
    assert "hostnmae" in found.stdout + found.stderr


def test_it_provisions_with_the_same_commands_as_a_user() -> None:
    text = VAGRANTFILE.read_text()
    assert "make -C /srv/clrk setup" in text
    assert "make -C /srv/clrk test" in text
