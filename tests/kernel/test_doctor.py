"""clrk-runtime doctor on this host, and what it says of hosts that lack something."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from instances import DEADLINE_S

from clrk.core import wire
from clrk.core.resources import RuntimeSpec
from clrk.runtime.doctor import Finding, check_cgroups, check_uids, examine, report
from clrk.runtime.doctor_trial import Trip, judge_escapes, judge_stamp

pytestmark = pytest.mark.kernel
DOCTOR = [str(Path(sys.executable).parent / "clrk-runtime"), "doctor"]


def run_doctor(*arguments):
    return subprocess.run([*DOCTOR, *arguments], capture_output=True, text=True, check=False, timeout=DEADLINE_S)


def made_by_doctors():
    found = [Path("/run") / name for name in os.listdir("/run")] + [
        Path("/run/netns") / n for n in os.listdir("/run/netns")
    ]
    return {path for path in found if path.name.startswith("doctor")}


def test_this_host_is_well_and_nothing_is_left():
    before = made_by_doctors()
    done = run_doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    findings = {finding["name"]: finding for finding in told["findings"]}
    assert told["ok"] is True
    for name in ("kernel", "BTF", "cgroup v2", "BPF programs", "sandbox", "stamped round trip", "escape attempts"):
        assert findings[name]["ok"], findings[name]
    assert "raw-socket EPERM" in findings["escape attempts"]["found"]
    assert made_by_doctors() <= before


def test_without_root_it_says_so_and_tries_nothing(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 65534)
    assert report(examine(RuntimeSpec(), "doctorx"), as_json=False) == 1
    out = capsys.readouterr().out
    assert "FAIL  root: uid 65534\n      fix: sudo clrk-runtime doctor\n" in out
    assert "not tried: mend the above first" in out


@pytest.mark.parametrize(
    ("mounts", "name"),
    [
        ("cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n", "cgroup v2"),
        ("none /nowhere cgroup2 rw 0 0\n", "cgroup memory"),
    ],
)
def test_a_tree_that_is_missing(mounts, name):
    finding = {finding.name: finding for finding in check_cgroups(mounts)}[name]
    assert not finding.ok
    assert finding.fix


@pytest.mark.parametrize(
    ("uids", "subuid", "owner"),
    [
        ([0, 2_000_003], "", "uid 2000003"),
        ([0], "vagrant:1999999:65536\n", "1999999:65536 of vagrant"),
        ([0, 1000, 65534], "vagrant:100000:65536\nbroken\n", None),
    ],
)
def test_uids_of_somebody_else(uids, subuid, owner):
    finding = check_uids(RuntimeSpec(), uids, subuid)
    assert finding.ok is (owner is None)
    assert owner is None or owner in finding.found


def good_trip():
    template = bytes([7]) * wire.HEADER_SIZE
    value = wire.CONNECTION_VALUE.pack(1, 2, 3, 2_000_001, b"python3")
    behind = wire.V4_TLV_OFFSET + wire.PP2_TLV_HEADER_SIZE
    header = bytearray(template)
    header[wire.V4_DST_OFFSET : wire.V4_DST_OFFSET + 4] = bytes((203, 0, 113, 7))
    header[behind : behind + len(value)] = value
    attempts = "raw-socket packet-socket udp unstamped-connection listener-port new-network-namespace shadow".split()
    lines = [f"{name} EPERM" for name in attempts] + ["answer yes 203.0.113.7"]
    return Trip(bytes(header), b"stamped?", template, 2_000_001, lines, "")


def test_a_good_trip_is_good():
    assert judge_stamp(good_trip()).ok
    assert judge_escapes(good_trip()).ok


@pytest.mark.parametrize(
    "change",
    [
        {"header": b""},
        {"header": bytes(wire.HEADER_SIZE)},
        {"uid": 2_000_002},
        {"greeting": b"forged"},
        {"lines": []},
    ],
)
def test_a_stamp_that_is_not_ours_is_told(change):
    assert not judge_stamp(dataclasses.replace(good_trip(), **change)).ok


@pytest.mark.parametrize("line", ["udp OPEN", "udp", "udp timed out"])
def test_an_escape_is_told(line):
    trip = good_trip()
    lines = [old for old in trip.lines if not old.startswith("udp")] + [line]
    finding = judge_escapes(dataclasses.replace(trip, lines=lines))
    assert not finding.ok
    assert finding.found.startswith("udp: ")


def test_a_warning_does_not_fail_the_host(capsys):
    findings = [Finding("a", ok=True, found="x"), Finding("b", ok=False, found="y", fix="z", is_warning=True)]
    assert report(iter(findings), as_json=False) == 0
    assert "warn  b: y\n      fix: z\n" in capsys.readouterr().out
