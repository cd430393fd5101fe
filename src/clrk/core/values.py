"""What resources are made of: values as people write them (durations, quantities, names), and the common head. Pure."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from ipaddress import IPv4Address, ip_address
from typing import Annotated, Final, Literal

import idna
import re2
from cronsim import CronSim, CronSimError
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic.alias_generators import to_camel

CRON_MNEMONICS: Final = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
API_VERSIONS: Final = ("clrk/v1alpha1", "clrk.apoxy.dev/v1alpha1")
_SECRET_HEADERS: Final = ("authorization", "proxy-authorization", "cookie", "x-api-key", "api-key", "x-goog-api-key")
_DURATION: Final = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")
# A name that ends like this is an IPv4 address in one of its spellings to many parsers (WHATWG URL, ends-in-a-number).
NUMERIC_LABEL: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")
_LABEL: Final = re.compile(r"[a-z0-9_]([-a-z0-9_]{0,61}[a-z0-9_])?")
_QUANTITY: Final = re.compile(r"(\d+(?:\.\d+)?)(Ki|Mi|Gi|Ti|k|M|G|T|m)?")
_MAX_QUANTITY_CHARS: Final = 32  # far from where a float becomes infinite
_SCALE: Final = {
    "": 1.0, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12,
    "Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40,
}  # fmt: skip


def parse_duration(value: object) -> float:
    """Return seconds of `90`, `90s`, `1m30s`, `250ms`, `1h`, `7d`.

    Raises: ValueError with the accepted forms.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and value and (found := _DURATION.fullmatch(value)):
        days, hours, minutes, seconds, millis = (float(group or 0) for group in found.groups())
        return days * 86_400 + hours * 3600 + minutes * 60 + seconds + millis / 1000
    raise ValueError(f"{value!r} is not a duration; write for example 100s, 5m, 1h30m or 7d")


def parse_quantity(value: object) -> float:
    """Return the number of a Kubernetes quantity: `512Mi`, `1`, `500m`, `1.5`.

    Raises: ValueError with the accepted forms.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, str) and len(value) <= _MAX_QUANTITY_CHARS and (found := _QUANTITY.fullmatch(value)):
        return float(found[1]) * _SCALE[found[2] or ""]
    raise ValueError(f"{value!r} is not a quantity; write for example 512Mi, 1Gi, 500m or 2")


def parse_whole_quantity(value: object) -> int:
    """Return a quantity that must be whole: `65536`, `64Ki`.

    Raises: ValueError with the accepted forms.
    """
    number = parse_quantity(value)
    if number != int(number):
        raise ValueError(f"{value!r} is not a whole number")
    return int(number)


def _check_schedule(value: str) -> str:
    """Five cron fields or a mnemonic, in UTC."""
    if value in CRON_MNEMONICS:
        return value
    if len(value.split()) != 5:
        raise ValueError(f"{value!r} is not a schedule: write five fields, or one of {', '.join(CRON_MNEMONICS)}")
    try:
        CronSim(value, datetime(2026, 1, 1, tzinfo=UTC))
    except CronSimError as exc:
        raise ValueError(f"{value!r} is not a schedule: {exc}") from None
    return value


def _check_identity_header(value: str) -> str:
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}", value):
        raise ValueError(f"{value!r} is not a header name")
    if value.lower().startswith("ce-"):
        raise ValueError(f"{value!r}: ce-* headers say what the caller likes, so they are no identity")
    if value.lower() in _SECRET_HEADERS:
        raise ValueError(f"{value!r} holds a secret, which would be shown on every span; use a JWT extractor")
    return value


def _check_json_path(value: str) -> str:
    from clrk.core.json_path import compile_json_path  # its library takes 40 ms, and few resources have a JSONPath

    compile_json_path(value)
    return value


def _check_dns_label(value: str) -> str:
    if len(value) > 63 or not re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", value):
        raise ValueError(f"{value!r} is not a DNS label: a-z, 0-9 and -, at most 63 characters")
    return value


def is_sandbox_itself(name: str) -> bool:
    """Say whether a sandbox's resolver answers a name by itself (RFC 6761, section 6.3): nothing leaves."""
    return name.rpartition(".")[2] == "localhost"


def _check_no_localhost(value: str) -> str:
    if is_sandbox_itself(value):
        text = "give what runs on this host a name of its own, by hostAliases of the gateway"
        raise ValueError(f"{value!r} is the sandbox itself: {text}")
    return value


def _check_no_address(value: str) -> str:
    if _is_ipv4(value):
        raise ValueError(f"{value!r} is an address, which has no name to go by: write the host name that agents dial")
    return value


def _is_ipv4(text: str) -> bool:
    try:
        return bool(IPv4Address(text).packed)
    except ValueError:
        return False


def _check_host_pattern(value: str) -> str:
    """`example.com`, `*.example.com` (one label) or `**.example.com` (any depth); `bücher.example` as A-labels."""
    if not value.isascii():
        stars, _, name = value.rpartition("*.")
        try:
            value = f"{stars}*." * bool(stars or value.startswith("*.")) + idna.encode(name, uts46=True).decode("ascii")
        except idna.IDNAError as exc:
            raise ValueError(f"{value!r} is not a host name: {exc}") from None
    labels = re.sub(r"^\*\*?\.", "", value).split(".")
    if len(value) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{value!r} is not a host name; write it lower-case, no scheme, no port; *.x and **.x allowed")
    if NUMERIC_LABEL.fullmatch(labels[-1]) and not _is_ipv4(value):
        advice = "; an address is written like 10.0.0.1" if labels[-2:-1] and labels[-2].isdecimal() else ""
        raise ValueError(f"{value!r} ends in a number, so it is no host name to any client{advice}")
    return value


def _check_no_flag(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("not a whole number")
    return value


def _check_ip_port(value: str) -> str:
    host, sep, port = value.rpartition(":")
    try:
        ip_address(host.removeprefix("[").removesuffix("]"))
        if not sep or not 0 < int(port) < 65_536:
            raise ValueError
    except ValueError:
        raise ValueError(f"{value!r} is not ip:port; write for example 127.0.0.1:8080 or [::1]:8080") from None
    return value


def _check_regex(value: str) -> str:
    """An RE2 pattern: linear in the text, whatever an agent writes."""
    options = re2.Options()
    options.log_errors = False
    try:
        re2.compile(value, options)
    except re2.error as exc:
        why = exc.args[0].decode() if exc.args and isinstance(exc.args[0], bytes) else str(exc)
        raise ValueError(f"{value!r} is not an RE2 regular expression: {why}") from None
    return value


Seconds = Annotated[float, BeforeValidator(parse_duration), Field(ge=0)]
ByteCount = Annotated[float, BeforeValidator(parse_quantity), Field(ge=0)]
DnsLabel = Annotated[str, AfterValidator(_check_dns_label)]
HostPattern = Annotated[str, AfterValidator(_check_host_pattern)]
DialledHost = Annotated[HostPattern, AfterValidator(_check_no_localhost)]
DialledName = Annotated[DialledHost, AfterValidator(_check_no_address)]
IpPort = Annotated[str, AfterValidator(_check_ip_port)]
Regex = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_check_regex)]
Port = Annotated[int, BeforeValidator(_check_no_flag), Field(ge=1, le=65_535)]
Schedule = Annotated[str, AfterValidator(_check_schedule)]
IdentityHeader = Annotated[str, AfterValidator(_check_identity_header)]
JsonPath = Annotated[str, Field(pattern=r"^\$", max_length=1024), AfterValidator(_check_json_path)]
IdentityField = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,62}$")]


class Model(BaseModel):
    """Base of every resource part: camelCase in YAML, unknown fields refused, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, alias_generator=to_camel, populate_by_name=True)


class Metadata(Model):
    """Name of a resource."""

    name: DnsLabel
    namespace: DnsLabel = "default"
    labels: dict[str, str] = {}


class Resource(Model):
    """Common head of every document."""

    api_version: Literal["clrk/v1alpha1", "clrk.apoxy.dev/v1alpha1"] = "clrk/v1alpha1"
    metadata: Metadata


class GatewayRef(Model):
    """Names an EgressGateway of the same namespace."""

    name: DnsLabel = "default"
