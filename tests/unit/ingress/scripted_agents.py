"""The agents of these tests: each a bash script that does one thing, well or badly."""

from clrk.core.resources import DaemonAgent, TaskAgent


def agent(name, command, *, namespace="default", mode="Stdin", content_type=None, **spec):
    """Return a TaskAgent that runs a bash script."""
    delivery = {"mode": mode} | ({"contentType": content_type} if content_type else {})
    return TaskAgent.model_validate(
        {
            "kind": "TaskAgent",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"template": {"spec": {"command": ["bash", "-c", command]}}, "delivery": delivery, **spec},
        }
    )


def daemon(name, command, **spec):
    """Return a DaemonAgent that runs a bash script."""
    template = {"spec": {"command": ["bash", "-c", command]}}
    return DaemonAgent.model_validate(
        {"kind": "DaemonAgent", "metadata": {"name": name}, "spec": {"template": template, **spec}}
    )


CURL = "curl -sS --max-time 20 -H 'Host: 169.254.169.254'"
JSON = "-H 'Content-Type: application/json'"
AGENTS = [
    agent("echo", "cat", content_type="application/json"),
    agent("echo", "echo in team", namespace="team"),
    agent("text", "printf hello", content_type="text/plain"),
    agent("silent", "true"),
    agent("fails", "echo why >&2; exit 3"),
    agent("cut", "printf part; sleep 0.05; exit 4"),
    agent("crash", "kill -SEGV $$"),
    agent("slow", "sleep 60", timeout=0.3),
    agent("slowtalk", "printf part; sleep 60", timeout=3),
    agent("forever", "echo ready; sleep 600"),
    agent("mute", "sleep 600"),
    agent("deaf", "exec 0</dev/null; echo done"),
    agent("deafopen", "sleep 0.2; echo done"),
    agent("flood", "head -c 200000000 /dev/zero"),
    agent("stderrflood", "head -c 300000 /dev/zero | tr '\\0' x >&2; echo ok >&2; echo out"),
    agent("lines", "yes '' | head -c 2000000"),
    agent("one", "cat >/dev/null; read -r < \"$GATE\"; echo ok", maxConcurrent=1),
    agent("env", "echo $TRACEPARENT $CLRK_INVOCATION_ID"),
    agent("poolless", "true"),
    agent("broken", "true"),
    agent("gone", "true"),
    agent("unstarted", "true"),
    agent("unspawned", "true"),
    agent("post", f"{CURL} -d '{{}}' {JSON} -H 'X-Clrk-Status: 201' $URL/v1/response", mode="Metadata"),
    agent("postlate", f"{CURL} -d early $URL/v1/response; read -r < \"$GATE\"; echo late; exit 5", mode="Metadata"),
    agent("postnone", "true", mode="Metadata"),
    agent("postfails", "exit 6", mode="Metadata"),
    agent("postslow", "sleep 60", mode="Metadata", timeout=0.3),
    agent("post204", f"{CURL} -X POST -H 'X-Clrk-Status: 204' $URL/v1/response", mode="Metadata"),
    agent("probe", "echo $URL $URL6; cat >/dev/null; read -r < \"$GATE\""),
    agent("probemeta", "echo $URL > \"$GATE.url\"; read -r < \"$GATE\"", mode="Metadata"),
]  # fmt: skip
