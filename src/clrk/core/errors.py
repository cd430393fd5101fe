"""The root of every error that clrk raises on purpose."""

from __future__ import annotations


class ClrkError(Exception):
    """Something a user, an operator or a peer did, or the host could not do; never a bug of ours."""


class ConfigError(ClrkError):
    """Resources that can not be used.

    Shape: problems is one line per finding: `file:line: kind/name: field.path: what; what to do`.
    """

    def __init__(self, problems: tuple[str, ...]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class HostError(ClrkError):
    """The host refused an operation: message says operation, object, errno and what is missing."""


class ProtocolError(ClrkError):
    """A peer broke a protocol. Terminal for the object that raised it.

    Shape: code is stable and low-cardinality; offset is the index of the first offending byte, or 0.
    """

    def __init__(self, code: str, message: str, offset: int = 0) -> None:
        super().__init__(message)
        self.code = code
        self.offset = offset
