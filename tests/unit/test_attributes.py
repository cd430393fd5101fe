"""The names are an interface: dashboards depend on them letter by letter."""

import re

from clrk.gateway.telemetry import attributes as attr

# CONTRACT sections 10 to 13, typed in by hand and not derived from the module.
CONTRACT = """
invocation.id agent.kind agent.namespace agent.name agent.uid agent.revision clrk.sandbox.id clrk.sandbox.warm
process.pid process.executable.name network.peer.address network.peer.port clrk.dst.name clrk.req.bytes clrk.resp.bytes
gen_ai.system gen_ai.provider.name gen_ai.operation.name gen_ai.request.model gen_ai.request.stream
gen_ai.request.max_tokens gen_ai.request.temperature gen_ai.request.top_k gen_ai.request.top_p
gen_ai.response.id gen_ai.response.model gen_ai.response.finish_reasons gen_ai.response.time_to_first_chunk
gen_ai.usage.input_tokens gen_ai.usage.output_tokens gen_ai.usage.cache_read.input_tokens
gen_ai.usage.cache_creation.input_tokens gen_ai.usage.reasoning.output_tokens clrk.cost.usd
mcp.method.name mcp.session.id mcp.protocol.version mcp.resource.uri gen_ai.tool.name jsonrpc.request.id error.type
clrk.egress.deny_reason clrk.budget.denied clrk.budget.daily_used clrk.budget.daily_max clrk.budget.route
clrk.body.usage_visible clrk.body.request_rewritten http.request.method http.request.method_original
http.response.status_code url.full url.path url.scheme server.address server.port client.address client.port
network.protocol.version service.name service.version host.name clrk.component clrk.egress_gateway
""".split()
SPANS = """
ingress.dispatch sandbox.acquire sandbox.spawn sandbox.teardown egress.tcp egress.dial.denied egress.dial.failed
egress.dns.denied egress.proxy.malformed
""".split()


def constants():
    return {name: value for name, value in vars(attr).items() if name.isupper() and isinstance(value, str)}


def test_every_name_of_the_contract_has_a_constant():
    assert set(CONTRACT) - set(constants().values()) == set()
    assert {value for name, value in constants().items() if name.startswith("SPAN_")} == set(SPANS)
    assert attr.invoke_agent_span_name("support") == "invoke_agent support"
    assert attr.SCHEMA_URL == "https://opentelemetry.io/schemas/1.41.1"


def test_constants_are_named_after_their_values_and_no_name_is_given_twice():
    prefixes = ("SPAN_", "OPERATION_", "ERROR_TYPE_", "SCHEMA_URL", "EVENT_")
    names = {name: value for name, value in constants().items() if not name.startswith(prefixes)}
    names = {name: value for name, value in names.items() if not name.endswith("_PREFIX")}
    assert len(set(names.values())) == len(names)
    for name, value in names.items():
        assert re.sub(r"[.]", "_", value).upper() == name
