"""One header file for C, BPF C and Python: the layouts and numbers agree."""

from __future__ import annotations

import re
import struct
import subprocess
from importlib import resources
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest

from clrk.core import wire
from clrk.core.wire import FlowRecord
from clrk.ebpf.header import load_extension

WIRE_H = Path(str(resources.files("clrk.core").joinpath("wire.h")))
STRUCTS = {
    "clrk_flow_key": (wire.FLOW_KEY, ["netns_cookie", "src", "src_port", "family"]),
    "clrk_flow": (wire.FLOW, ["dst", "cookie", "connect_ns", "tgid", "uid", "dst_port", "family", "comm"]),
    "clrk_sandbox": (
        wire.SANDBOX,
        ["egress_v4", "egress_v6", "metadata_v4", "metadata_v6", "header_v4", "header_v6"],
    ),
}


def python_offsets(layout: struct.Struct, names: list[str]) -> dict[str, int]:
    codes = re.findall(r"\d*[a-zA-Z]", layout.format.removeprefix("="))
    offsets, at = {}, 0
    for name, code in zip(names, codes_one_by_one(codes), strict=True):
        offsets[name] = at
        at += struct.calcsize("=" + code)
    assert at == layout.size
    return offsets


def codes_one_by_one(codes: list[str]) -> list[str]:
    single = []
    for code in codes:
        count, kind = code[:-1], code[-1]
        single += [code] if kind == "s" else [kind] * int(count or 1)
    return single


@pytest.mark.parametrize("name", STRUCTS)
def test_layout_in_the_extension(name: str) -> None:
    layout, names = STRUCTS[name]
    ffi = load_extension().ffi
    assert ffi.sizeof(f"struct {name}") == layout.size
    assert {field: ffi.offsetof(f"struct {name}", field) for field in names} == python_offsets(layout, names)
    assert [field for field, _ in ffi.typeof(f"struct {name}").fields] == names


@pytest.mark.parametrize("compiler", [["gcc"], ["clang"], ["clang", "-target", "bpf"]], ids=["gcc", "clang", "bpf"])
def test_layout_in_other_compilers(compiler: list[str]) -> None:
    lines = ["#include <stddef.h>", "typedef unsigned char __u8; typedef unsigned short __u16; typedef unsigned __u32;"]
    lines += ["typedef unsigned long long __u64;", f'#include "{WIRE_H}"']
    for name, (layout, names) in STRUCTS.items():
        lines.append(f'_Static_assert(sizeof(struct {name}) == {layout.size}, "{name}");')
        for field, offset in python_offsets(layout, names).items():
            lines.append(f'_Static_assert(offsetof(struct {name}, {field}) == {offset}, "{name}.{field}");')
    source = "\n".join(lines) + "\n"
    command = [*compiler, "-Wall", "-Wextra", "-Werror", "-ffreestanding", "-fsyntax-only", "-x", "c", "-"]
    result = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_every_number_in_wire_py_is_the_compilers() -> None:
    names = [
        name
        for name in re.findall(r"^#define CLRK_(\w+) ", WIRE_H.read_text(), re.MULTILINE)
        if isinstance(getattr(wire, name, None), int)
    ]
    assert len(names) > 30
    asserts = "\n".join(f'_Static_assert(CLRK_{name} == {getattr(wire, name)}, "{name}");' for name in names)
    types = "typedef unsigned char __u8; typedef unsigned __u32; typedef unsigned long long __u64;"
    source = f'{types}\n#include "{WIRE_H}"\n{asserts}\n'
    subprocess.run(["gcc", "-fsyntax-only", "-Werror", "-x", "c", "-"], input=source, text=True, check=True)


def test_every_define_is_a_plain_number() -> None:
    """What the reader in wire.py can not read would be missing in silence."""
    defined = re.findall(r"^#define CLRK_(\w+) (\S+)", WIRE_H.read_text(), re.MULTILINE)
    assert dict(defined).keys() == wire._read_defines(WIRE_H.read_text()).keys()


def test_header_size_keeps_the_contract() -> None:
    assert wire.HEADER_SIZE % 4 == 0
    assert wire.HEADER_SIZE <= 528
    assert wire.CONNECTION_VALUE.size == wire.CONN_VALUE_SIZE == 40


def test_header_holes_are_aligned_in_the_sandbox() -> None:
    """The kernel program copies templates by words of eight bytes."""
    ffi = load_extension().ffi
    assert ffi.offsetof("struct clrk_sandbox", "header_v4") % 8 == 0
    assert ffi.offsetof("struct clrk_sandbox", "header_v6") % 8 == 0


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::", "0.0.0.0"])
def test_addresses_survive_the_mapped_form(address: str) -> None:
    parsed = ip_address(address)
    assert wire.unmap(wire.map_address(parsed)) == parsed
    assert len(wire.map_address(parsed)) == 16


def test_a_mapped_address_is_ipv4() -> None:
    assert wire.unmap(IPv6Address("::ffff:1.2.3.4").packed) == IPv4Address("1.2.3.4")


def test_flow_record_round_trip() -> None:
    record = FlowRecord(ip_address("93.184.216.34"), 443, wire.FAMILY_V4, 2**63 + 1, 2**62, 4242, 65534, b"python3")
    assert FlowRecord.unpack(record.pack()) == record


def test_flow_record_reads_what_c_writes() -> None:
    ffi = load_extension().ffi
    flow = ffi.new("struct clrk_flow *")
    flow.dst = list(IPv6Address("2001:db8::7").packed)
    flow.cookie, flow.connect_ns, flow.tgid, flow.uid = 2**64 - 1, 5, 6, 7
    flow.dst_port, flow.family, flow.comm = 65535, wire.FAMILY_V6, b"sixteen-chars-x"
    assert FlowRecord.unpack(bytes(ffi.buffer(flow))) == FlowRecord(
        ip_address("2001:db8::7"), 65535, wire.FAMILY_V6, 2**64 - 1, 5, 6, 7, b"sixteen-chars-x"
    )


def test_flow_key_is_what_c_has() -> None:
    ffi = load_extension().ffi
    key = ffi.new("struct clrk_flow_key *")
    key.netns_cookie, key.src_port, key.family = 7465, 40000, wire.FAMILY_V4
    key.src = list(bytes(10) + b"\xff\xff" + bytes([100, 64, 0, 1]))
    raw = bytes(ffi.buffer(key))
    assert wire.pack_flow_key(7465, "100.64.0.1", 40000, wire.FAMILY_V4) == raw
    assert wire.pack_flow_key(7465, "::ffff:100.64.0.1", 40000, wire.FAMILY_V4) == raw
