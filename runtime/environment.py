"""What an agent's environment says of its invocation. PATH, HOME and the CA variables are isolation.py's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from clrk.core.messages import StartRun
from clrk.core.resources import Agent

METADATA_URL_V4: Final = "http://169.254.169.254"
METADATA_URL_V6: Final = "http://[fd00:ec2::254]"


def build_environment(
    agent: Agent, request: StartRun, secrets: Mapping[tuple[str, str], Mapping[str, str]]
) -> dict[str, str]:
    """Return the variables of one run; nothing of the runtime's own environment is among them.

    Shape: the agent's `env` comes first, so that it can not forge the invocation's own names. secrets maps
        (namespace, name) of a Secret to its values.
    Raises: KeyError when a secret is gone; loading has checked that it is there.
    """
    environment = {"LANG": "C.UTF-8"}
    for variable in agent.spec.template.spec.env:
        if variable.value_from is None:
            environment[variable.name] = variable.value or ""
        else:
            ref = variable.value_from.secret_key_ref
            environment[variable.name] = secrets[(agent.metadata.namespace, ref.name)][ref.key]
    environment |= {
        "CLRK_INVOCATION_ID": request.run_id,
        "CLRK_METADATA_URL": METADATA_URL_V4,
        "CLRK_METADATA_URL_V6": METADATA_URL_V6,
        "TRACEPARENT": request.traceparent,
    }
    environment.pop("TRACESTATE", None)  # it belongs to the traceparent: only the invocation's own may stand beside it
    if request.tracestate:
        environment["TRACESTATE"] = request.tracestate
    return environment
