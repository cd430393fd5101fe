"""The control protocol between clrk-runtime and clrk-gateway: what may be said, and in which direction.

One AF_UNIX SOCK_SEQPACKET pair; a packet is one MessagePack struct with SCM_RIGHTS fds. Both sides treat the other as
hostile: unknown types, oversized fields and missing fds are a ProtocolError, and the connection is over.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

PROTOCOL_VERSION: Final = 2
MAX_PACKET_SIZE: Final = 65_536
MAX_FDS: Final = 16

# \Z, not $: that would let a newline pass at the end.
_Name = Annotated[str, msgspec.Meta(max_length=63, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?\Z")]
_Uuid = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\Z")]
_Tracestate = Annotated[str, msgspec.Meta(max_length=512, pattern=r"^[\x20-\x7e]*\Z")]
_Traceparent = Annotated[str, msgspec.Meta(pattern=r"^(00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2})?\Z")]
_Baggage = Annotated[str, msgspec.Meta(max_length=8192, pattern=r"^[\x20-\x7e]*\Z")]
_Text = Annotated[str, msgspec.Meta(max_length=1024)]


class AgentKind(enum.StrEnum):
    """Kind of an agent resource."""

    TASK = "TaskAgent"
    DAEMON = "DaemonAgent"


class AgentKey(msgspec.Struct, frozen=True):
    """Names one agent resource."""

    namespace: _Name
    name: _Name


# --- runtime -> gateway -------------------------------------------------------------------------------------------


class ConfigureFd(enum.IntEnum):
    """Index of each fd that comes with Configure."""

    CONFIG = 0  # memfd: JSON of GatewayConfig (core/gateway_config.py)
    FLOWS = 1  # BPF map of flow records
    INGRESS = 2  # listening TCP socket
    ADMIN_UNIX = 3  # listening unix socket
    ADMIN_TCP = 4  # listening TCP socket


class Configure(msgspec.Struct, frozen=True, tag=True):
    """First message, and again after each reload (then with the CONFIG fd alone).

    Shape: notes say, for people, what of the reload does not take effect now, and what is valid but can not be meant.
    """

    version: int
    generation: int
    notes: list[_Text] = []


class StartedFd(enum.IntEnum):
    """Index of each fd that comes with Started; the listeners were opened inside the sandbox's network namespace."""

    EGRESS_V4 = 0
    EGRESS_V6 = 1
    METADATA_V4 = 2
    METADATA_V6 = 3
    DNS_UDP = 4
    DNS_TCP = 5
    OTLP = 6
    STDIN = 7  # write end
    STDOUT = 8  # read end
    STDERR = 9  # read end


class Started(msgspec.Struct, frozen=True, tag=True):
    """A sandbox belongs to the run from now on; sent before the agent's first instruction.

    Shape: run_id, here and in every message, is the invocation id for a TaskAgent, and a UUID of its own for a daemon.
    warm says that the sandbox was prepared for this very agent (warmPoolSize). ca_id names the CA in its bundle
    (core.gateway_config.ca_id), which a rotation does not change.

    Units: *_ns are CLOCK_REALTIME nanoseconds. header_v4/v6 are the templates registered with the kernel.
    """

    run_id: _Uuid
    sandbox_id: str
    netns_name: str
    netns_cookie: int
    uid: int
    header_v4: bytes
    header_v6: bytes
    warm: bool
    acquire_start_ns: int
    acquire_end_ns: int
    ca_id: _Text = ""


class Spawned(msgspec.Struct, frozen=True, tag=True):
    """The sandbox's first process exists (pid in the initial pid namespace)."""

    run_id: _Uuid
    pid: int
    spawn_start_ns: int
    spawn_end_ns: int


class StartFailure(enum.StrEnum):
    """Why a run did not start."""

    UNKNOWN_AGENT = "unknown_agent"
    POOL_EXHAUSTED = "pool_exhausted"
    DRAINING = "draining"
    SANDBOX_FAILED = "sandbox_failed"
    STATE_FULL = "state_full"  # the agent's state folder is at its sizeLimitMB


class StartFailed(msgspec.Struct, frozen=True, tag=True):
    """The run will not happen; nothing of it is left."""

    run_id: _Uuid
    reason: StartFailure
    message: _Text


class ExitReason(enum.StrEnum):
    """What ended the run."""

    EXITED = "exited"  # by itself: see exit_code, signal
    TIMEOUT = "timeout"
    OOM = "oom"
    STOPPED = "stopped"  # StopRun or shutdown


class Exited(msgspec.Struct, frozen=True, tag=True):
    """The agent's main process is gone and everything in the sandbox is being killed.

    Shape: exit_code is 0..255 as a shell shows it (128+N for signal N).
    Units: cpu_s in seconds of user and system time, max_rss_bytes the peak of one process, exit_ns CLOCK_REALTIME.
    """

    run_id: _Uuid
    reason: ExitReason
    exit_code: int
    cpu_s: float
    max_rss_bytes: int
    exit_ns: int


class Removed(msgspec.Struct, frozen=True, tag=True):
    """Namespaces, cgroups, map entries and files of the run are gone."""

    run_id: _Uuid
    teardown_start_ns: int
    teardown_end_ns: int


class Drain(msgspec.Struct, frozen=True, tag=True):
    """Refuse new invocations with 503; answer Drained when none is left."""


class Counters(msgspec.Struct, frozen=True, tag=True):
    """Kernel counters by name and sandboxes by state, for `clrk` and metrics; sent once a second while they change.

    Shape: states of a sandbox are `ready` (made ahead), `warm` (prepared for one agent) and `running`. warm_agents
    counts the warm ones by namespace/name of the agent.
    """

    values: dict[str, int]
    sandboxes: dict[str, int] = {}
    warm_agents: dict[str, int] = {}


class ReloadRefused(msgspec.Struct, frozen=True, tag=True):
    """A reload found problems (file, line, field, fix), and nothing was changed. At most 64 of them are told."""

    problems: list[_Text]


# --- gateway -> runtime -------------------------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The gateway serves ingress with the configuration of this generation."""

    version: int
    generation: int


class StartRun(msgspec.Struct, frozen=True, tag=True):
    """Start one run of an agent. timeout_s may only shorten a TaskAgent's own timeout; 0 means the agent's.

    Shape: a daemon has no traceparent; its run ends by itself or by StopRun.
    """

    run_id: _Uuid
    agent: AgentKey
    traceparent: _Traceparent = ""
    tracestate: _Tracestate = ""
    timeout_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 0.0
    baggage: _Baggage = ""
    kind: AgentKind = AgentKind.TASK


class StopRun(msgspec.Struct, frozen=True, tag=True):
    """End a run: the caller went away, or its answer is complete. Unknown ids are ignored (it may just have ended).

    Units: grace_s is the time between SIGTERM to the agent's main process and SIGKILL to everything; 0: at once.
    """

    run_id: _Uuid
    grace_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.0


class Drained(msgspec.Struct, frozen=True, tag=True):
    """No invocation is in flight and every span is in the store."""


RuntimeMessage = Configure | Started | Spawned | StartFailed | Exited | Removed | Drain | Counters | ReloadRefused
GatewayMessage = Ready | StartRun | StopRun | Drained
