"""The per-host certificate authority: made once, kept from others, and refused when it must not be used."""

from __future__ import annotations

import datetime
import os
import stat
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clrk.core.errors import HostError
from clrk.runtime import ca


def test_is_made_once_and_then_loaded(tmp_path):
    first = ca.load_or_create(tmp_path / "state")
    assert ca.load_or_create(tmp_path / "state") == first
    assert sorted(os.listdir(tmp_path / "state")) == ["ca"]  # no staging folder stays


def test_only_root_can_read_it(tmp_path):
    ca.load_or_create(tmp_path)
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "ca").iterdir()} == {0o600}


def test_is_a_p256_authority_for_leaves_only(tmp_path):
    made = ca.load_or_create(tmp_path)
    certificate = x509.load_pem_x509_certificate(made.cert_pem.encode())
    key = certificate.public_key()
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert key.curve.name == "secp256r1"
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value.ca, constraints.value.path_length) == (True, True, 0)
    usage = certificate.extensions.get_extension_for_class(x509.KeyUsage).value
    assert (usage.key_cert_sign, usage.digital_signature) == (True, False)
    certificate.verify_directly_issued_by(certificate)


def test_the_key_is_not_in_its_repr(tmp_path):
    assert "PRIVATE" not in repr(ca.load_or_create(tmp_path))


@pytest.mark.parametrize("name", ["", "ca.key", "ca.crt"])
def test_what_others_could_have_read_is_refused(tmp_path, name):
    ca.load_or_create(tmp_path)
    os.chmod(tmp_path / "ca" / name, 0o755)
    with pytest.raises(HostError, match=r"others may have read the key; to mend it, `clrk-runtime ca rotate`"):
        ca.load_or_create(tmp_path)


def test_a_link_in_place_of_the_key_is_refused(tmp_path):
    ca.load_or_create(tmp_path)
    key = tmp_path / "ca" / "ca.key"
    key.rename(tmp_path / "elsewhere")
    key.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HostError, match="must be owned by root"):
        ca.load_or_create(tmp_path)


def test_a_missing_key_is_an_error_and_nothing_is_made_anew(tmp_path):
    ca.load_or_create(tmp_path)
    (tmp_path / "ca" / "ca.key").unlink()
    with pytest.raises(HostError, match=r"No such file or directory: .*/ca/ca.key"):
        ca.load_or_create(tmp_path)


@pytest.mark.parametrize("name", ["ca.key", "ca.crt"])
def test_garbage_is_refused(tmp_path, name):
    ca.load_or_create(tmp_path)
    (tmp_path / "ca" / name).write_text("garbage")
    with pytest.raises(HostError, match="its certificate or key can not be read"):
        ca.load_or_create(tmp_path)


def test_a_key_of_another_certificate_is_refused(tmp_path):
    ca.load_or_create(tmp_path / "a")
    other = ca.load_or_create(tmp_path / "b")
    (tmp_path / "a" / "ca" / "ca.key").write_text(other.key_pem)
    with pytest.raises(HostError, match="its key does not belong to its certificate"):
        ca.load_or_create(tmp_path / "a")


@pytest.mark.parametrize(
    ("begin_h", "end_h", "why"), [(-72, 24, "it expires at"), (-72, -24, "it expires at"), (24, 240, "check the clock")]
)
def test_a_certificate_outside_its_time_is_refused(tmp_path, begin_h, end_h, why):
    rewrite_validity(tmp_path, begin_h, end_h)
    with pytest.raises(HostError, match=why):
        ca.load_or_create(tmp_path)


def rewrite_validity(state_dir: Path, begin_h: int, end_h: int) -> None:
    made = ca.load_or_create(state_dir)
    key = serialization.load_pem_private_key(made.key_pem.encode(), None)
    old = x509.load_pem_x509_certificate(made.cert_pem.encode())
    now = datetime.datetime.now(datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(old.subject).issuer_name(old.subject).public_key(old.public_key())
    builder = builder.serial_number(1).not_valid_before(now + datetime.timedelta(hours=begin_h))
    certificate = builder.not_valid_after(now + datetime.timedelta(hours=end_h)).sign(key, hashes.SHA256())
    (state_dir / "ca" / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))


def test_two_runtimes_on_one_state_folder_agree(tmp_path, monkeypatch):
    """The loser of the race uses the winner's authority: here the winner comes in between."""
    real = Path.rename
    winner: list[ca.HostCa] = []

    def late(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", real)
        winner.append(ca.load_or_create(tmp_path))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", late)
    assert ca.load_or_create(tmp_path) == winner[0]
    assert os.listdir(tmp_path) == ["ca"]


def test_a_state_folder_that_can_not_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="Not a directory"):
        ca.load_or_create(tmp_path / "file" / "state")


# --- rotation -------------------------------------------------------------------------------------------------------


def test_rotation_leaves_one_new_authority_and_nothing_of_the_old_one(tmp_path):
    old = ca.load_or_create(tmp_path)
    (tmp_path / ".ca-crashed").mkdir()  # what a crash of an earlier rotation left
    (tmp_path / ".ca-crashed" / "ca.key").write_text(old.key_pem)
    new = ca.rotate(tmp_path)
    assert new.id != old.id
    assert ca.load_or_create(tmp_path) == ca.load(tmp_path) == new
    assert os.listdir(tmp_path) == ["ca"]
    assert stat.S_IMODE((tmp_path / "ca").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in (tmp_path / "ca").iterdir()} == {0o600}


@pytest.mark.parametrize("spoil", ["mode", "garbage", "missing"])
def test_rotation_mends_an_authority_that_can_not_be_used(tmp_path, spoil):
    ca.load_or_create(tmp_path)
    key = tmp_path / "ca" / "ca.key"
    if spoil == "mode":
        key.chmod(0o644)
    elif spoil == "garbage":
        key.write_text("x")
    else:
        key.unlink()
    with pytest.raises(HostError):
        ca.load_or_create(tmp_path)
    new = ca.rotate(tmp_path)
    assert ca.load_or_create(tmp_path) == new


def test_a_crash_between_the_renames_is_mended_by_the_next_start(tmp_path, monkeypatch):
    old = ca.load_or_create(tmp_path)
    rename = Path.rename

    def crash(self, target):
        if Path(target) == tmp_path / "ca":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", crash)
    with pytest.raises(KeyboardInterrupt):
        ca.rotate(tmp_path)
    monkeypatch.undo()
    assert ca.load_or_create(tmp_path).id != old.id


def test_without_state_there_is_nothing_to_rotate(tmp_path):
    with pytest.raises(HostError, match="the first start of clrk-runtime makes it"):
        ca.rotate(tmp_path / "nowhere")
    with pytest.raises(HostError, match="No such file"):
        ca.load(tmp_path)


def test_former_authorities_are_kept_while_a_sandbox_trusts_them(tmp_path):
    made = [ca.load_or_create(tmp_path / str(number)) for number in range(6)]
    held = ca.Authorities(made[0])
    assert not held.replace(made[0], ())
    for one in made[1:]:
        assert held.replace(one, {made[0].id})
    assert held.current == made[5]
    kept = [former.cert_pem for former in held.former()]
    assert kept == [made[number].cert_pem for number in (0, 3, 4)]  # trusted, and the last two
    assert not held.replace(made[5], ())
    assert [former.cert_pem for former in held.former()] == kept[1:]


def test_the_former_keys_are_not_in_a_repr(tmp_path):
    held = ca.Authorities(ca.load_or_create(tmp_path / "a"))
    held.replace(ca.load_or_create(tmp_path / "b"), ())
    assert "PRIVATE" not in repr(held.former())
