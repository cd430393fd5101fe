"""Every attribute and span name that clrk writes, in one place; nobody writes such a name as a literal elsewhere.

Names come from the opentelemetry-semantic-conventions package where it has them (its `_incubating` modules hold what
semconv 1.41.1 calls Development: gen_ai, mcp, jsonrpc, process). The rest is clrk's own (CONTRACT sections 10 to 13).
Types are noted where they are easy to get wrong; an int attribute is never sent as a string.
"""

from __future__ import annotations

from typing import Final

from opentelemetry.semconv._incubating.attributes import (
    aws_attributes,
    cloudevents_attributes,
    gen_ai_attributes,
    host_attributes,
    jsonrpc_attributes,
    log_attributes,
    mcp_attributes,
    openai_attributes,
    process_attributes,
    rpc_attributes,
    tls_attributes,
)
from opentelemetry.semconv.attributes import (
    client_attributes,
    error_attributes,
    http_attributes,
    network_attributes,
    server_attributes,
    service_attributes,
    url_attributes,
    user_agent_attributes,
)

# The last core release that holds GenAI and MCP: github.com/open-telemetry/semantic-conventions, tag v1.41.1.
SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.41.1"

# --- Span names (CONTRACT section 13) -------------------------------------------------------------------------------
SPAN_INGRESS_DISPATCH: Final = "ingress.dispatch"
SPAN_SANDBOX_ACQUIRE: Final = "sandbox.acquire"
SPAN_SANDBOX_SPAWN: Final = "sandbox.spawn"
SPAN_SANDBOX_TEARDOWN: Final = "sandbox.teardown"
SPAN_EGRESS_TCP: Final = "egress.tcp"
SPAN_EGRESS_DIAL_DENIED: Final = "egress.dial.denied"
SPAN_EGRESS_DIAL_FAILED: Final = "egress.dial.failed"
SPAN_EGRESS_DNS_DENIED: Final = "egress.dns.denied"
SPAN_EGRESS_PROXY_MALFORMED: Final = "egress.proxy.malformed"

# Events of egress spans, where captureBody asks for them; the names of bodies are ECS's, semconv has none.
EVENT_HTTP_REQUEST_HEADERS: Final = "http.request.headers"
EVENT_HTTP_REQUEST_BODY: Final = "http.request.body"
EVENT_HTTP_RESPONSE_HEADERS: Final = "http.response.headers"
EVENT_HTTP_RESPONSE_BODY: Final = "http.response.body"
HTTP_REQUEST_BODY_CONTENT: Final = "http.request.body.content"
HTTP_RESPONSE_BODY_CONTENT: Final = "http.response.body.content"


def invoke_agent_span_name(agent_name: str) -> str:
    """Return the name of the run's span (semconv 1.41.1, gen-ai-agent-spans, invoke_agent)."""
    return f"{OPERATION_INVOKE_AGENT} {agent_name}"


# --- Identity, on every span ----------------------------------------------------------------------------------------
INVOCATION_ID: Final = "invocation.id"
AGENT_KIND: Final = "agent.kind"
AGENT_NAMESPACE: Final = "agent.namespace"
AGENT_NAME: Final = "agent.name"
AGENT_UID: Final = "agent.uid"
AGENT_REVISION: Final = "agent.revision"
AGENT_IDENTITY_PREFIX: Final = "agent.identity."
CLRK_SANDBOX_ID: Final = "clrk.sandbox.id"

# --- Resource -------------------------------------------------------------------------------------------------------
SERVICE_NAME: Final = service_attributes.SERVICE_NAME
SERVICE_VERSION: Final = service_attributes.SERVICE_VERSION
HOST_NAME: Final = host_attributes.HOST_NAME
CLRK_COMPONENT: Final = "clrk.component"
CLRK_EGRESS_GATEWAY: Final = "clrk.egress_gateway"

# --- clrk's own -----------------------------------------------------------------------------------------------------
CLRK_SANDBOX_WARM: Final = "clrk.sandbox.warm"  # bool
CLRK_TRIGGER: Final = "clrk.trigger"  # http, cron, cli or the caller's X-Clrk-Trigger
CLRK_CALLER_PID: Final = "clrk.caller.pid"  # int: who called over the admin socket, as the kernel says
CLRK_CALLER_UID: Final = "clrk.caller.uid"  # int
CLRK_EXIT_CODE: Final = "clrk.exit_code"  # int
CLRK_EXIT_REASON: Final = "clrk.exit_reason"  # core.messages.ExitReason
CLRK_PHASE: Final = "clrk.phase"  # Succeeded, Failed, Timeout, Rejected
CLRK_CPU_TIME: Final = "clrk.cpu_time"  # float, seconds
CLRK_MEMORY_PEAK: Final = "clrk.memory.peak"  # int, bytes
CLRK_DST_NAME: Final = "clrk.dst.name"
CLRK_REQ_BYTES: Final = "clrk.req.bytes"  # int
CLRK_RESP_BYTES: Final = "clrk.resp.bytes"  # int
CLRK_EGRESS_DENY_REASON: Final = "clrk.egress.deny_reason"
CLRK_EGRESS_ROUTE: Final = "clrk.egress.route"
CLRK_EGRESS_ADD_RULE: Final = "clrk.egress.add_rule"  # YAML: the item of EgressL4Route spec.rules that would allow it
CLRK_EGRESS_WOULD_DENY: Final = "clrk.egress.would_deny"  # a deny reason, where the gateway's mode is not Enforce
CLRK_COST_USD: Final = "clrk.cost.usd"  # float
CLRK_COST_UNKNOWN: Final = "clrk.cost.unknown"  # bool: the call was probably billed, and nobody here knows the price
CLRK_GEN_AI_REFUSED: Final = "clrk.gen_ai.refused"  # bool: the model declined to answer
CLRK_GEN_AI_RESPONSE_SERVICE_TIER: Final = (
    "clrk.gen_ai.response.service_tier"  # of providers for which semconv has no name
)
CLRK_GEN_AI_USAGE_WEB_SEARCHES: Final = "clrk.gen_ai.usage.web_searches"  # int: made and billed by the provider
CLRK_BODY_USAGE_VISIBLE: Final = "clrk.body.usage_visible"  # bool
CLRK_BODY_REQUEST_REWRITTEN: Final = "clrk.body.request_rewritten"  # bool
CLRK_BODY_TRUNCATED: Final = "clrk.body.truncated"  # bool: there was more than was captured
CLRK_BODY_SKIPPED: Final = "clrk.body.skipped"  # why there is no content: encoding, binary or memory
CLRK_TLS_CLIENT_REJECTED_CA: Final = "clrk.tls.client_rejected_ca"  # bool
CLRK_TLS_INTERCEPTED: Final = "clrk.tls.intercepted"  # bool
CLRK_PROXY_ERROR_CODE: Final = "clrk.proxy.error_code"
CLRK_CONNECTION_COOKIE: Final = "clrk.connection.cookie"  # int: the kernel's socket cookie
CLRK_BUDGET_DENIED: Final = "clrk.budget.denied"  # bool
CLRK_BUDGET_DAILY_USED: Final = "clrk.budget.daily_used"  # int, tokens; float, USD, where that was short
CLRK_BUDGET_DAILY_MAX: Final = "clrk.budget.daily_max"  # as above; absent: the day is not limited
CLRK_BUDGET_ROUTE: Final = "clrk.budget.route"  # namespace/name of an AIProviderRoute
CLRK_BUDGET_LIMIT: Final = "clrk.budget.limit"  # the field of tokenBudget that was short
CLRK_BUDGET_KEY: Final = "clrk.budget.key"  # who shares the account: budget.Account.key
CLRK_CREDENTIAL_POLICIES: Final = "clrk.credential.policies"  # string[], namespace/name: whose credentials went out

# --- Of metrics and log records only --------------------------------------------------------------------------------
LOG_IOSTREAM: Final = log_attributes.LOG_IOSTREAM  # stdout or stderr
GEN_AI_TOKEN_TYPE: Final = gen_ai_attributes.GEN_AI_TOKEN_TYPE  # input or output
OTEL_METRIC_OVERFLOW: Final = "otel.metric.overflow"  # bool: stands for attributes beyond the cap (metrics SDK spec)
CLRK_SANDBOX_STATE: Final = "clrk.sandbox.state"  # core.messages.Counters
CLRK_KERNEL_COUNTER: Final = "clrk.kernel.counter"
CLRK_DROP_REASON: Final = "clrk.drop.reason"
CLRK_EXPORTER: Final = "clrk.exporter"  # namespace/name of an EgressGateway, or environment
CLRK_EXPORT_SIGNAL: Final = "clrk.export.signal"  # traces, logs or metrics

# --- Process and network --------------------------------------------------------------------------------------------
PROCESS_PID: Final = process_attributes.PROCESS_PID  # int
PROCESS_EXECUTABLE_NAME: Final = process_attributes.PROCESS_EXECUTABLE_NAME
CLIENT_ADDRESS: Final = client_attributes.CLIENT_ADDRESS
CLIENT_PORT: Final = client_attributes.CLIENT_PORT  # int
SERVER_ADDRESS: Final = server_attributes.SERVER_ADDRESS
SERVER_PORT: Final = server_attributes.SERVER_PORT  # int
NETWORK_PEER_ADDRESS: Final = network_attributes.NETWORK_PEER_ADDRESS
NETWORK_PEER_PORT: Final = network_attributes.NETWORK_PEER_PORT  # int
NETWORK_TRANSPORT: Final = network_attributes.NETWORK_TRANSPORT
NETWORK_PROTOCOL_NAME: Final = network_attributes.NETWORK_PROTOCOL_NAME
NETWORK_PROTOCOL_VERSION: Final = network_attributes.NETWORK_PROTOCOL_VERSION
TLS_CLIENT_SERVER_NAME: Final = "tls.client.server_name"  # 1.41.1 deprecates it; kept: it is the SNI
TLS_PROTOCOL_VERSION: Final = tls_attributes.TLS_PROTOCOL_VERSION
ERROR_TYPE: Final = error_attributes.ERROR_TYPE
DNS_QUESTION_NAME: Final = "dns.question.name"  # semconv 1.41.1, registry/attributes/dns (Development)

# --- HTTP (Stable) --------------------------------------------------------------------------------------------------
HTTP_REQUEST_METHOD: Final = http_attributes.HTTP_REQUEST_METHOD
HTTP_REQUEST_METHOD_ORIGINAL: Final = http_attributes.HTTP_REQUEST_METHOD_ORIGINAL
HTTP_REQUEST_RESEND_COUNT: Final = http_attributes.HTTP_REQUEST_RESEND_COUNT  # int, only when sent again
HTTP_RESPONSE_STATUS_CODE: Final = http_attributes.HTTP_RESPONSE_STATUS_CODE  # int
HTTP_ROUTE: Final = http_attributes.HTTP_ROUTE
HTTP_REQUEST_BODY_SIZE: Final = "http.request.body.size"  # int, as transferred
HTTP_RESPONSE_BODY_SIZE: Final = "http.response.body.size"  # int, as transferred
HTTP_REQUEST_HEADER_PREFIX: Final = http_attributes.HTTP_REQUEST_HEADER_TEMPLATE + "."  # string[]
HTTP_RESPONSE_HEADER_PREFIX: Final = http_attributes.HTTP_RESPONSE_HEADER_TEMPLATE + "."  # string[]
URL_FULL: Final = url_attributes.URL_FULL
URL_PATH: Final = url_attributes.URL_PATH
URL_QUERY: Final = url_attributes.URL_QUERY
URL_SCHEME: Final = url_attributes.URL_SCHEME
USER_AGENT_ORIGINAL: Final = user_agent_attributes.USER_AGENT_ORIGINAL

# --- CloudEvents (Development) --------------------------------------------------------------------------------------
CLOUDEVENTS_EVENT_ID: Final = cloudevents_attributes.CLOUDEVENTS_EVENT_ID
CLOUDEVENTS_EVENT_SOURCE: Final = cloudevents_attributes.CLOUDEVENTS_EVENT_SOURCE
CLOUDEVENTS_EVENT_SPEC_VERSION: Final = cloudevents_attributes.CLOUDEVENTS_EVENT_SPEC_VERSION
CLOUDEVENTS_EVENT_SUBJECT: Final = cloudevents_attributes.CLOUDEVENTS_EVENT_SUBJECT
CLOUDEVENTS_EVENT_TYPE: Final = cloudevents_attributes.CLOUDEVENTS_EVENT_TYPE

# --- GenAI (Development) --------------------------------------------------------------------------------------------
OPERATION_CHAT: Final = gen_ai_attributes.GenAiOperationNameValues.CHAT.value
OPERATION_COUNT_TOKENS: Final = "count_tokens"  # semconv has no word for it, and allows one of our own
OPERATION_EMBEDDINGS: Final = gen_ai_attributes.GenAiOperationNameValues.EMBEDDINGS.value
OPERATION_EXECUTE_TOOL: Final = gen_ai_attributes.GenAiOperationNameValues.EXECUTE_TOOL.value
OPERATION_GENERATE_CONTENT: Final = gen_ai_attributes.GenAiOperationNameValues.GENERATE_CONTENT.value
OPERATION_INVOKE_AGENT: Final = gen_ai_attributes.GenAiOperationNameValues.INVOKE_AGENT.value
OPERATION_TEXT_COMPLETION: Final = gen_ai_attributes.GenAiOperationNameValues.TEXT_COMPLETION.value
AWS_BEDROCK_GUARDRAIL_ID: Final = aws_attributes.AWS_BEDROCK_GUARDRAIL_ID
AWS_REQUEST_ID: Final = aws_attributes.AWS_REQUEST_ID
GEN_AI_AGENT_ID: Final = gen_ai_attributes.GEN_AI_AGENT_ID
GEN_AI_AGENT_NAME: Final = gen_ai_attributes.GEN_AI_AGENT_NAME
GEN_AI_AGENT_VERSION: Final = gen_ai_attributes.GEN_AI_AGENT_VERSION
GEN_AI_CONVERSATION_ID: Final = gen_ai_attributes.GEN_AI_CONVERSATION_ID
GEN_AI_EMBEDDINGS_DIMENSION_COUNT: Final = gen_ai_attributes.GEN_AI_EMBEDDINGS_DIMENSION_COUNT  # int
GEN_AI_OPERATION_NAME: Final = gen_ai_attributes.GEN_AI_OPERATION_NAME
GEN_AI_OUTPUT_TYPE: Final = gen_ai_attributes.GEN_AI_OUTPUT_TYPE
GEN_AI_PROMPT_NAME: Final = gen_ai_attributes.GEN_AI_PROMPT_NAME
GEN_AI_PROVIDER_NAME: Final = gen_ai_attributes.GEN_AI_PROVIDER_NAME
GEN_AI_REQUEST_CHOICE_COUNT: Final = gen_ai_attributes.GEN_AI_REQUEST_CHOICE_COUNT  # int
GEN_AI_REQUEST_ENCODING_FORMATS: Final = gen_ai_attributes.GEN_AI_REQUEST_ENCODING_FORMATS  # string[]
GEN_AI_REQUEST_FREQUENCY_PENALTY: Final = gen_ai_attributes.GEN_AI_REQUEST_FREQUENCY_PENALTY  # float
GEN_AI_REQUEST_MAX_TOKENS: Final = gen_ai_attributes.GEN_AI_REQUEST_MAX_TOKENS  # int
GEN_AI_REQUEST_MODEL: Final = gen_ai_attributes.GEN_AI_REQUEST_MODEL
GEN_AI_REQUEST_PRESENCE_PENALTY: Final = gen_ai_attributes.GEN_AI_REQUEST_PRESENCE_PENALTY  # float
GEN_AI_REQUEST_PREVIOUS_RESPONSE_ID: Final = "gen_ai.request.previous_response.id"  # semconv-genai, after 1.41.1
GEN_AI_REQUEST_SEED: Final = gen_ai_attributes.GEN_AI_REQUEST_SEED  # int
GEN_AI_REQUEST_STOP_SEQUENCES: Final = gen_ai_attributes.GEN_AI_REQUEST_STOP_SEQUENCES  # string[]
GEN_AI_REQUEST_STREAM: Final = gen_ai_attributes.GEN_AI_REQUEST_STREAM  # bool, only when streaming
GEN_AI_REQUEST_TEMPERATURE: Final = gen_ai_attributes.GEN_AI_REQUEST_TEMPERATURE  # float
GEN_AI_REQUEST_TOP_K: Final = gen_ai_attributes.GEN_AI_REQUEST_TOP_K  # float, although it counts
GEN_AI_REQUEST_TOP_P: Final = gen_ai_attributes.GEN_AI_REQUEST_TOP_P  # float
GEN_AI_RESPONSE_FINISH_REASONS: Final = gen_ai_attributes.GEN_AI_RESPONSE_FINISH_REASONS  # string[], one per choice
GEN_AI_RESPONSE_ID: Final = gen_ai_attributes.GEN_AI_RESPONSE_ID
GEN_AI_RESPONSE_MODEL: Final = gen_ai_attributes.GEN_AI_RESPONSE_MODEL
GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK: Final = gen_ai_attributes.GEN_AI_RESPONSE_TIME_TO_FIRST_CHUNK  # float, seconds
GEN_AI_SYSTEM: Final = gen_ai_attributes.GEN_AI_SYSTEM  # deprecated by semconv, asked for by CONTRACT section 13
GEN_AI_TOOL_CALL_ID: Final = gen_ai_attributes.GEN_AI_TOOL_CALL_ID
GEN_AI_TOOL_NAME: Final = gen_ai_attributes.GEN_AI_TOOL_NAME
GEN_AI_USAGE_INPUT_TOKENS: Final = gen_ai_attributes.GEN_AI_USAGE_INPUT_TOKENS  # int, cached tokens included
GEN_AI_USAGE_OUTPUT_TOKENS: Final = gen_ai_attributes.GEN_AI_USAGE_OUTPUT_TOKENS  # int, reasoning included
GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: Final = gen_ai_attributes.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS  # int
GEN_AI_USAGE_CACHE_CREATION_INPUT_TOKENS: Final = gen_ai_attributes.GEN_AI_USAGE_CACHE_CREATION_INPUT_TOKENS  # int
GEN_AI_USAGE_REASONING_OUTPUT_TOKENS: Final = gen_ai_attributes.GEN_AI_USAGE_REASONING_OUTPUT_TOKENS  # int
OPENAI_API_TYPE: Final = openai_attributes.OPENAI_API_TYPE
OPENAI_REQUEST_SERVICE_TIER: Final = openai_attributes.OPENAI_REQUEST_SERVICE_TIER
OPENAI_RESPONSE_SERVICE_TIER: Final = openai_attributes.OPENAI_RESPONSE_SERVICE_TIER
OPENAI_RESPONSE_SYSTEM_FINGERPRINT: Final = openai_attributes.OPENAI_RESPONSE_SYSTEM_FINGERPRINT

# --- MCP and JSON-RPC (Development) ---------------------------------------------------------------------------------
MCP_METHOD_NAME: Final = mcp_attributes.MCP_METHOD_NAME
MCP_PROTOCOL_VERSION: Final = mcp_attributes.MCP_PROTOCOL_VERSION
MCP_RESOURCE_URI: Final = mcp_attributes.MCP_RESOURCE_URI
MCP_SESSION_ID: Final = mcp_attributes.MCP_SESSION_ID
JSONRPC_REQUEST_ID: Final = jsonrpc_attributes.JSONRPC_REQUEST_ID  # string form of the id
JSONRPC_PROTOCOL_VERSION: Final = jsonrpc_attributes.JSONRPC_PROTOCOL_VERSION  # only when not 2.0
RPC_RESPONSE_STATUS_CODE: Final = rpc_attributes.RPC_RESPONSE_STATUS_CODE  # string form of the JSON-RPC error code
ERROR_TYPE_TOOL: Final = "tool_error"  # value of error.type when a tool result has isError (semconv 1.41.1, mcp)
ERROR_TYPE_OTHER: Final = error_attributes.ErrorTypeValues.OTHER.value
