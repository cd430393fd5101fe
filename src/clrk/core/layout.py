"""Where one instance of the runtime keeps things on the host: the only owner of path and name prefixes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from clrk.core.errors import ConfigError

_INSTANCE = re.compile(r"[a-z][a-z0-9]{0,13}")


@dataclass(frozen=True, slots=True)
class HostLayout:
    """Names that this instance owns and may remove; everything else on the host is other people's.

    Shape: instance is 1..14 characters [a-z0-9], first a letter. The default instance is `clrk`.
    """

    instance: str = "clrk"

    def __post_init__(self) -> None:
        if not _INSTANCE.fullmatch(self.instance):
            raise ConfigError((f"instance {self.instance!r}: use 1 to 14 of a-z and 0-9, a letter first",))

    @property
    def run_dir(self) -> Path:
        """Sockets, lock and the files shown to sandboxes; gone after a reboot."""
        return Path("/run") / self.instance

    @property
    def admin_socket(self) -> Path:
        """Where `clrk` finds the daemon."""
        return self.run_dir / "admin.sock"

    @property
    def cgroup_name(self) -> str:
        """Parent cgroup of all sandboxes, in the v2 tree and in each v1 controller."""
        return self.instance

    @property
    def netns_prefix(self) -> str:
        """A sandbox's namespace is this plus its id."""
        return f"{self.instance}-"
