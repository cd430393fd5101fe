"""An agent with a schedule, and the times that the tests of schedules reckon with."""

from datetime import UTC, datetime

from scripted_agents import agent

SECOND = 10**9
MINUTE = 60 * SECOND
NOON = int(datetime(2026, 3, 14, 12, tzinfo=UTC).timestamp()) * SECOND


def job(name="job", schedule="* * * * *", command="true", **spec):
    return agent(name, command, schedule=schedule, **spec)
