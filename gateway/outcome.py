"""How an invocation ends, and what its caller is told about it. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

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

    @property
    def ended(self) -> bool:
        """Say whether nothing comes after it."""
        return self not in (Phase.PENDING, Phase.RUNNING)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a run.

    Shape: exit_code is None when none is known, exit_reason is one of ExitReason or "". message is for people.
    """

    phase: Phase
    exit_code: int | None = None
    message: str = ""
    has_run: bool = True  # False: the agent's first instruction was never executed
    exit_reason: str = ""

    @property
    def succeeded(self) -> bool:
        """Say whether the answer, if any was given, is whole and meant."""
        return self.phase is Phase.SUCCEEDED


CALLER_GONE: Final = Outcome(Phase.CANCELLED, message="the caller went away")


def outcome_of(
    exited: Exited, cancelled: Outcome | None, lacks_answer: bool, timeout_s: float | None = None
) -> Outcome:
    """Judge an exit. cancelled: why we asked for it; lacks_answer: Metadata mode, and no answer was posted."""
    phase, message = (cancelled.phase, cancelled.message) if cancelled is not None else _judge(exited, lacks_answer)
    if timeout_s is not None and cancelled is None and phase is Phase.TIMEOUT:
        message += f" of {timeout_s:g} s"
    return Outcome(phase, exited.exit_code, message, exit_reason=exited.reason.value)


def _judge(exited: Exited, lacks_answer: bool) -> tuple[Phase, str]:
    code = exited.exit_code
    match exited.reason:
        case ExitReason.TIMEOUT:
            return Phase.TIMEOUT, "the agent did not finish within its timeout"
        case ExitReason.OOM:
            return Phase.FAILED, "the agent was killed at its memory limit"
        case ExitReason.STOPPED:
            return Phase.FAILED, "the run was stopped by the host"
        case ExitReason.EXITED if code != 0:
            return Phase.FAILED, f"the agent exited with code {code}"
        case ExitReason.EXITED if lacks_answer:
            return Phase.FAILED, "the agent exited without posting an answer"
        case ExitReason.EXITED:
            return Phase.SUCCEEDED, ""
