"""How an invocation ends, and what its caller is told about it. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from clrk.core.messages import Exited, ExitReason


class Phase(enum.StrEnum):
    """Where an invocation stands."""

    PENDING = "Pending"
    RUNNING = "Running"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    TIMEOUT = "Timeout"
    REJECTED = "Rejected"
    CANCELLED = "Cancelled"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run. exit_code is None when none is known, message is for people."""

    phase: Phase
    exit_code: int | None = None
    message: str = ""
    has_run: bool = True  # False: the agent's first instruction was never executed

    @property
    def succeeded(self) -> bool:
        """Say whether the answer, if any was given, is whole and meant."""
        return self.phase is Phase.SUCCEEDED


def outcome_of(exited: Exited, cancelled: bool, lacks_answer: bool) -> Outcome:
    """Judge an exit. cancelled: we asked for it; lacks_answer: Metadata mode, and no answer was posted."""
    code = exited.exit_code
    match exited.reason:
        case _ if cancelled:
            return Outcome(Phase.CANCELLED, code, "the caller went away")
        case ExitReason.TIMEOUT:
            return Outcome(Phase.TIMEOUT, code, "the agent did not finish within its timeout")
        case ExitReason.OOM:
            return Outcome(Phase.FAILED, code, "the agent was killed at its memory limit")
        case ExitReason.STOPPED:
            return Outcome(Phase.FAILED, code, "the run was stopped by the host")
        case ExitReason.EXITED if code != 0:
            return Outcome(Phase.FAILED, code, f"the agent exited with code {code}")
        case ExitReason.EXITED if lacks_answer:
            return Outcome(Phase.FAILED, code, "the agent exited without posting an answer")
        case ExitReason.EXITED:
            return Outcome(Phase.SUCCEEDED, code)
