"""What a sandbox's network namespace looks like (DESIGN section 3): facts only, no I/O."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from clrk.core.messages import StartedFd
from clrk.core.wire import PORT_DNS, PORT_EGRESS, PORT_METADATA, PORT_OTLP

EGRESS_V4: Final = "169.254.0.1"
EGRESS_V6: Final = "fd00:c1::1"
METADATA_V4: Final = "169.254.169.254"
METADATA_V6: Final = "fd00:ec2::254"

# Non-loopback, non-link-local address of each family: what AI_ADDRCONFIG looks for, and what source selection picks.
SOURCE_V4: Final = "100.64.0.1"
SOURCE_V6: Final = "fd00:c1::2"

LISTEN_BACKLOG: Final = 1024

ADDRESSES: Final[tuple[tuple[str, int], ...]] = (
    (EGRESS_V4, 32),
    (METADATA_V4, 32),
    (SOURCE_V4, 32),
    (EGRESS_V6, 128),
    (METADATA_V6, 128),
    (SOURCE_V6, 128),
)
"""Every address of `lo` beside 127.0.0.1/8 and ::1/128, with its prefix length."""


class Transport(enum.Enum):
    """Transport of a listening socket."""

    TCP = "tcp"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class ListenerPlan:
    """One socket that the runtime opens inside the namespace."""

    transport: Transport
    address: str
    port: int

    @property
    def is_v6(self) -> bool:
        """Whether the address is IPv6."""
        return ":" in self.address


LISTENERS: Final[dict[StartedFd, ListenerPlan]] = {
    StartedFd.EGRESS_V4: ListenerPlan(Transport.TCP, EGRESS_V4, PORT_EGRESS),
    StartedFd.EGRESS_V6: ListenerPlan(Transport.TCP, EGRESS_V6, PORT_EGRESS),
    StartedFd.METADATA_V4: ListenerPlan(Transport.TCP, METADATA_V4, PORT_METADATA),
    StartedFd.METADATA_V6: ListenerPlan(Transport.TCP, METADATA_V6, PORT_METADATA),
    StartedFd.DNS_UDP: ListenerPlan(Transport.UDP, EGRESS_V4, PORT_DNS),
    StartedFd.DNS_TCP: ListenerPlan(Transport.TCP, EGRESS_V4, PORT_DNS),
    StartedFd.OTLP: ListenerPlan(Transport.TCP, EGRESS_V4, PORT_OTLP),
}
"""In the order in which they are opened and passed on: the order of StartedFd."""


@dataclass(frozen=True, slots=True)
class Sysctl:
    """One setting under /proc/sys.

    Shape: required settings close a way around the stamp (KERNEL.md section 3); a kernel that has the file must take
    the value.
    """

    name: str
    value: str
    required: bool = False

    @property
    def path(self) -> str:
        """File of the setting."""
        return "/proc/sys/" + self.name.replace(".", "/")


SYSCTLS: Final[tuple[Sysctl, ...]] = (
    Sysctl("net.ipv4.tcp_fastopen", "0", required=True),  # MSG_FASTOPEN data would leave unstamped
    Sysctl("net.mptcp.enabled", "0"),  # absent without CONFIG_MPTCP; then the protocol is, too
    # All connections of a sandbox share one destination: without these about 470 connects a second are the limit.
    Sysctl("net.ipv4.tcp_tw_reuse", "1", required=True),  # the default, 2, covers 127.0.0.0/8 only
    Sysctl("net.ipv4.tcp_max_tw_buckets", "4096", required=True),
    Sysctl("net.ipv4.ip_local_port_range", "1024 65535", required=True),
    Sysctl(
        "net.ipv4.ip_local_reserved_ports",
        ",".join(str(port) for port in sorted({listener.port for listener in LISTENERS.values()})),
        required=True,
    ),
    Sysctl("net.ipv4.ping_group_range", "1 0", required=True),  # an empty range: no ICMP sockets
)

TSTAMP_ALLOW_DATA: Final = Sysctl("net.core.tstamp_allow_data", "0")
"""Stops an agent from reading its own stamped header back. Per namespace on recent kernels only; on older ones the
file is the whole host's and is left alone: the flow record, not the header's secrecy, is what attribution rests on."""
