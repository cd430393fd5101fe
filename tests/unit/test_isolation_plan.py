"""What bwrap is asked to do, and the files it shows: everything that can be proved without running it."""

from __future__ import annotations

import dataclasses
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from clrk.core.errors import HostError
from clrk.core.layout import HostLayout
from clrk.core.resources import Mount, TemplateSpec
from clrk.runtime.isolation import MAX_ENVIRONMENT_BYTES, Run, encode_environment, plan_run
from clrk.runtime.view import CA_BUNDLE, CA_VARIABLES, LAUNCHER, HostView

CA = "-----BEGIN CERTIFICATE-----\nours\n-----END CERTIFICATE-----\n"
UID = 2_000_001


class TemporaryLayout(HostLayout):
    """A run folder that needs no root."""

    run_dir = property(lambda self: Path(os.environ["CLRK_TEST_RUN_DIR"]))  # type: ignore[assignment] # a fixed place


@pytest.fixture
def image(tmp_path: Path) -> Path:
    root = tmp_path / "image"
    for folder in ("usr/bin", "etc/ssl/certs", "etc/private", "srv", "secret", "proc", "tmp", "run"):
        (root / folder).mkdir(parents=True)
    (root / "bin").symlink_to("usr/bin")
    (root / "secret").chmod(0o700)
    (root / "etc/private").chmod(0o700)
    (root / "etc/shadow").write_text("secret")
    (root / "etc/shadow").chmod(0o640)
    (root / "etc/motd").write_text("hello\n")
    (root / "etc/passwd").write_text("alice:x:1000:\n")
    (root / "etc/link").symlink_to("/root/secret")
    (root / "etc/ssl/certs/ca-certificates.crt").write_text("the system's\n")
    (root / "etc/resolv.conf").symlink_to("/run/systemd/resolve/stub-resolv.conf")
    os.mkfifo(root / "etc/fifo", 0o644)
    return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostView]:
    """A view, which copies /etc: once for all tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLRK_TEST_RUN_DIR", str(tmp_path_factory.mktemp("view") / "run"))
        view = HostView.prepare(TemporaryLayout("clrkunit"), ca_cert_pem=CA)
        yield view
        view.remove()
        assert not view.directory.exists()


@pytest.fixture
def view(prepared: HostView, tmp_path: Path) -> HostView:
    """The view, with a folder that no sandbox may see."""
    (tmp_path / "state").mkdir()
    return dataclasses.replace(prepared, hidden=(PurePosixPath(tmp_path / "state"),))


def options_of(run: Run) -> list[str]:
    assert run.options.endswith(b"\0")
    return run.options[:-1].decode().split("\0")


def plan(view: HostView, template: TemplateSpec) -> Run:
    return plan_run(template, view, uid=UID, memory=512 * 2**20)


def environment_of(template: TemplateSpec, **environment: str) -> dict[str, str]:
    order = encode_environment(template, environment)
    assert int.from_bytes(order[:4], "little") == len(order) - 4
    assert order.endswith(b"\0")
    return dict(word.split("=", 1) for word in order[4:-1].decode().split("\0"))


def has(options: list[str], *words: str) -> bool:
    return any(options[at : at + len(words)] == list(words) for at in range(len(options)))


# --- the view -------------------------------------------------------------------------------------------------------


def test_etc_is_copied_without_what_is_private(view: HostView, image: Path) -> None:
    etc = view.etc_for(str(image))
    assert (etc / "motd").read_text() == "hello\n"
    for name in ("shadow", "private", "fifo"):
        assert not (etc / name).exists(), name
    assert os.readlink(etc / "link") == "/root/secret"  # a link is a name, not what it points to
    assert (etc / "passwd").read_text() == ""
    assert not (etc / "resolv.conf").is_symlink()
    assert (etc / "resolv.conf").read_text().startswith("nameserver 169.254.0.1\n")
    for folder, folders, names in os.walk(etc):
        for name in (*folders, *names):
            status = os.lstat(os.path.join(folder, name))
            assert stat.S_ISLNK(status.st_mode) or status.st_mode & 0o004, name


def test_the_bundle_is_the_systems_and_ours_at_every_usual_path(view: HostView, image: Path) -> None:
    etc = view.etc_for(str(image))
    for path in ("ssl/certs/ca-certificates.crt", "ssl/cert.pem", "pki/tls/certs/ca-bundle.crt", "ssl/ca-bundle.pem"):
        assert (etc / path).read_text() == "the system's\n\n" + CA


def test_a_linked_bundle_folder_is_never_written_through(view: HostView, image: Path, tmp_path: Path) -> None:
    """A rootfs is somebody's image: /etc/pki -> /somewhere must not make root write there."""
    target = tmp_path / "target"
    target.mkdir()
    (image / "etc/pki").symlink_to(target)
    etc = view.etc_for(str(image))
    assert list(target.iterdir()) == []
    assert (etc / "pki/tls/certs/ca-bundle.crt").read_text().endswith(CA)


def test_the_copy_is_made_once_for_each_rootfs(view: HostView, image: Path) -> None:
    assert view.etc_for(str(image)) == view.etc_for(str(image)) != view.etc_for("/")


def test_only_root_can_enter_the_view(view: HostView) -> None:
    assert view.directory.stat().st_mode & 0o077 == 0


def test_the_launcher_depends_on_nothing_of_the_rootfs() -> None:
    assert b"/ld-linux" not in LAUNCHER.read_bytes()  # static: no interpreter is named


# --- the plan -------------------------------------------------------------------------------------------------------


def test_folders_of_an_image_are_bound_read_only_and_private_ones_are_not(view: HostView, image: Path) -> None:
    options = options_of(plan(view, TemplateSpec(command=["x"], rootfs=str(image))))
    assert has(options, "--ro-bind", f"{image}/usr", "/usr")
    assert has(options, "--ro-bind", f"{image}/srv", "/srv")  # the image's own
    assert has(options, "--symlink", "usr/bin", "/bin")
    assert not [word for word in options if word.startswith(f"{image}/secret") or word == f"{image}/etc"]
    assert "--bind" not in options
    assert has(options, "--remount-ro", "/")


def test_folders_of_the_host_that_are_never_shown(view: HostView) -> None:
    options = options_of(plan(view, TemplateSpec(command=["x"])))
    for folder in (
        "/root",
        "/home",
        "/var",
        "/run",
        "/tmp",
        "/boot",
        "/srv",
        "/mnt",
        "/media",
        "/etc",
        "/sys",
        "/proc",
    ):
        assert not has(options, "--ro-bind", folder, folder), folder


def test_no_network_namespace_is_made(view: HostView) -> None:
    """The spawner has entered the sandbox's; a new one would have neither listeners nor a stamp."""
    options = options_of(plan(view, TemplateSpec(command=["x"])))
    assert {word for word in options if word.startswith("--unshare") or word.startswith("--share")} == {
        "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup",
    }  # fmt: skip
    for word in ("--die-with-parent", "--new-session", "--clearenv"):
        assert word in options


def test_mounts_come_with_folders_that_the_agent_can_enter(view: HostView, tmp_path: Path) -> None:
    mounts = [Mount(host_path=str(tmp_path), path="/a/b/c"), Mount(host_path=str(tmp_path), path="/w", read_only=False)]
    options = options_of(plan(view, TemplateSpec(command=["x"], mounts=mounts)))
    assert has(
        options, "--perms", "0755", "--dir", "/a", "--perms", "0755", "--dir", "/a/b",
        "--ro-bind", str(tmp_path), "/a/b/c",
    )  # fmt: skip
    assert has(options, "--bind", str(tmp_path), "/w")


def test_a_hidden_folder_is_covered_where_a_mount_shows_it(view: HostView, tmp_path: Path) -> None:
    mounts = [Mount(host_path=str(tmp_path), path="/data")]
    options = options_of(plan(view, TemplateSpec(command=["x"], mounts=mounts)))
    assert has(options, "--perms", "0000", "--tmpfs", "/data/state")


def test_a_mount_inside_a_hidden_folder_is_the_operators_word(view: HostView, tmp_path: Path) -> None:
    (tmp_path / "state/agent").mkdir()
    mounts = [Mount(host_path=str(tmp_path / "state/agent"), path="/data")]
    options = options_of(plan(view, TemplateSpec(command=["x"], mounts=mounts)))
    assert has(options, "--ro-bind", str(tmp_path / "state/agent"), "/data")


def test_the_environment_is_the_agents_alone(view: HostView) -> None:
    template = TemplateSpec(command=["x"], workdir="/work")
    environment = environment_of(template, TOKEN="hunter2", PATH="/mine", LD_PRELOAD="/x.so", PWD="/elsewhere", E="")
    assert environment == {
        "TOKEN": "hunter2", "PATH": "/mine", "LD_PRELOAD": "/x.so", "PWD": "/work", "E": "", "HOME": "/tmp",
        **dict.fromkeys(CA_VARIABLES, CA_BUNDLE),
    }  # fmt: skip
    run = plan(view, template)
    assert "--setenv" not in options_of(run)  # bwrap and the launcher have none at all


def test_an_environment_over_the_launchers_buffer_is_refused(view: HostView) -> None:
    template = TemplateSpec(command=["x"])
    fixed = len(encode_environment(template, {"A": ""})) - 4
    assert len(encode_environment(template, {"A": "x" * (MAX_ENVIRONMENT_BYTES - fixed)})) == MAX_ENVIRONMENT_BYTES + 4
    with pytest.raises(HostError, match="at most 1048576 fit"):
        encode_environment(template, {"A": "x" * (MAX_ENVIRONMENT_BYTES - fixed + 1)})


def test_the_launcher_gets_the_uid_and_the_command(view: HostView) -> None:
    words = list(plan(view, TemplateSpec(command=["agent", "-c"], args=["--flag"])).argv)
    assert words[words.index("--") + 1 :] == ["/run/clrk/launch", str(UID), "agent", "-c", "--flag"]


def test_state_is_a_writable_mount_from_the_runs_own_namespace(view: HostView) -> None:
    run = plan_run(TemplateSpec(command=["x"]), view, uid=UID, memory=2**29, state_path="/var/clrk/state")
    assert has(options_of(run), "--bind", str(view.state_point), "/var/clrk/state")
    assert list(view.state_point.iterdir()) == []


@pytest.mark.parametrize(
    "template",
    [
        TemplateSpec(command=["a\0b"]),
        TemplateSpec(command=["x"], workdir="/a\0b"),
        TemplateSpec(command=["x"], args=["\0"]),
    ],
)
def test_nul_is_refused(view: HostView, template: TemplateSpec) -> None:
    with pytest.raises(HostError, match="NUL"):
        plan(view, template)


def test_nul_in_the_environment_is_refused() -> None:
    with pytest.raises(HostError, match="NUL"):
        encode_environment(TemplateSpec(command=["x"]), {"A": "x\0B=y"})


def test_a_rootfs_that_is_not_there_is_named(view: HostView) -> None:
    with pytest.raises(HostError, match="rootfs /no/such"):
        plan(view, TemplateSpec(command=["x"], rootfs="/no/such"))


def test_another_ca_comes_into_new_bundles_only(view: HostView, image: Path) -> None:
    old = view.etc_for(str(image)) / "ssl/certs/ca-certificates.crt"
    renewed = view.with_ca("another\n")
    new = renewed.etc_for(str(image)) / "ssl/certs/ca-certificates.crt"
    assert view.ca_id != renewed.ca_id
    assert (old.read_text().endswith(CA), new.read_text().endswith("another\n")) == (True, True)
    assert view.with_ca(CA).etc_for(str(image)) not in (
        old.parents[2],
        new.parents[2],
    )  # back again: a folder of its own
