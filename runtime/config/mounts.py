"""Mounts that an agent could turn against the host, or against its own drop of privileges; its state is one.

bwrap makes mounts as root and follows links, on the host's side and in the view. Whatever lies below a folder that an
agent may write can become a link by the agent's next run, so nothing is mounted from there or to there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Final

from clrk.core.resources import Agent, TaskAgent, TemplateSpec
from clrk.runtime.config.nodes import Path

# The launcher runs as root from /run/clrk, and the dynamic loader obeys files in /etc.
_OURS: Final = tuple(map(PurePosixPath, ("/etc", "/run", "/proc", "/dev", "/run/clrk", "/etc/ld.so.preload")))
_DROP_DIR: Final = PurePosixPath("/run/clrk")
_TEMPLATE: Final[Path] = ("spec", "template", "spec")


def find_bad_mounts(agent: Agent, agents: Iterable[Agent]) -> Iterator[tuple[Path, str]]:
    """Yield the path of each field that must not be, and why. agents are all that are declared, this one too."""
    template = agent.spec.template.spec
    writable = list(_writable_on_host(agents))
    for index, mount in enumerate(template.mounts):
        target = _clean(mount.path)
        if target in _OURS or target.is_relative_to(_DROP_DIR):
            yield (*_TEMPLATE, "mounts", index, "path"), f"{mount.path} is clrk's own in every sandbox; choose another"
        for owner, folder in _behind(target, template, writable):
            text = f"leads through {folder}, which agent {owner} may write: a link there would move this mount"
            yield (*_TEMPLATE, "mounts", index, "path"), text
        for owner, folder in writable:
            if _host_is_below(mount.host_path, folder):
                text = f"inside {folder}, which agent {owner} may write: a link there would show any host path"
                yield (*_TEMPLATE, "mounts", index, "hostPath"), text
    yield from _find_bad_state(agent, template, writable)
    for owner, folder in writable:
        if _host_is_below(template.rootfs, folder) or _clean(template.rootfs) == _clean(folder):
            yield (*_TEMPLATE, "rootfs"), f"inside {folder}, which agent {owner} may write"


def _find_bad_state(
    agent: Agent, template: TemplateSpec, writable: Iterable[tuple[str, str]]
) -> Iterator[tuple[Path, str]]:
    """The state is writable too: what is mounted below it would be mounted through the agent's own files."""
    state = agent.spec.state if isinstance(agent, TaskAgent) else None
    if state is None:
        return
    target, field = _clean(state.mount_path), ("spec", "state", "mountPath")
    if target == PurePosixPath("/") or target in _OURS or target.is_relative_to(_DROP_DIR):
        yield field, f"{state.mount_path} is clrk's own in every sandbox; choose another"
    for owner, folder in _behind(target, template, writable):
        yield field, f"leads through {folder}, which agent {owner} may write: a link there would move the state"
    for index, mount in enumerate(template.mounts):
        if _clean(mount.path).is_relative_to(target):
            text = f"lies in spec.state.mountPath {state.mount_path}, which the agent may write; choose another"
            yield (*_TEMPLATE, "mounts", index, "path"), text


def _behind(
    target: PurePosixPath, template: TemplateSpec, writable: Iterable[tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """Yield the writable folders in which a mount point lies on the host, by way of the rootfs or another mount."""
    for path, source in (("/", template.rootfs), *((mount.path, mount.host_path) for mount in template.mounts)):
        shown = _clean(path)
        if _is_below(target, shown):
            place = os.path.join(source, target.relative_to(shown))
            yield from ((owner, folder) for owner, folder in writable if _host_is_below(place, folder))


def _writable_on_host(agents: Iterable[Agent]) -> Iterator[tuple[str, str]]:
    for agent in agents:
        for mount in agent.spec.template.spec.mounts:
            if not mount.read_only:
                yield f"{agent.metadata.namespace}/{agent.metadata.name}", mount.host_path


def _host_is_below(path: str, folder: str) -> bool:
    """As written, and as links lead now: an agent may have replaced one of them already."""
    return any(
        _is_below(_clean(inner), _clean(outer))
        for inner in (path, os.path.realpath(path))
        for outer in (folder, os.path.realpath(folder))
    )


def _is_below(path: PurePosixPath, folder: PurePosixPath) -> bool:
    return path != folder and path.is_relative_to(folder)


def _clean(path: str) -> PurePosixPath:
    return PurePosixPath("/" + os.path.normpath(path).lstrip("/"))
