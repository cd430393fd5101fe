"""Which rule of an AIProviderRoute is a call's, and which accounts its budgets charge (CONTRACT section 12). Pure.

The first rule that fits is the call's, in the order of routes (by name) and of their rules. What is not known fits: a
call without a readable model may be of any model. An endpoint fits when any reading of the path does (policy_paths.py),
since a budget must not be escaped by spelling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from clrk.core.egress_resources import EgressGateway
from clrk.core.globs import fits_glob
from clrk.core.route_resources import AIMatch, AIProviderRoute, AIRule, TokenBudget
from clrk.core.url_paths import path_readings
from clrk.gateway.budget import RUN_PREFIX, Account, Charge, limit_to_nano, merge_charges
from clrk.gateway.llm.completion import Provider
from clrk.gateway.policy_names import HostPattern, normalise_name
from clrk.gateway.telemetry.spans import Identity

_COMPATIBLE: Final = "openai_compatible"
_DIGEST_CHARS: Final = 12


@dataclass(frozen=True, slots=True)
class LlmCall:
    """What is known of a call before its body is read.

    Shape: provider is who the host is known to be, or whose API the path is; None: neither. recognised says that an
    interpreter reads it.
    """

    host: str
    readings: tuple[str, ...]
    provider: Provider | None
    recognised: bool

    @classmethod
    def of(cls, host: str, path: str, provider: Provider | None, *, recognised: bool) -> LlmCall:
        """Make one from a request's head."""
        return cls(normalise_name(host) or host.lower(), path_readings(path), provider, recognised)


@dataclass(frozen=True, slots=True)
class _Match:
    provider: str | None
    hosts: tuple[HostPattern, ...]
    endpoints: tuple[str, ...]
    models: tuple[str, ...]

    @classmethod
    def compile(cls, match: AIMatch) -> _Match:
        return cls(
            match.provider,
            tuple(HostPattern.compile(host) for host in match.hostnames),
            tuple(endpoint.casefold() for endpoint in match.endpoints),  # Azure's paths know no case
            tuple(model.casefold() for model in match.models),
        )

    def names_host(self, host: str) -> bool:
        return any(pattern.matches(host) for pattern in self.hosts)

    def may_fit(self, call: LlmCall) -> bool:
        """Say whether the call fits but for its model, which is not known yet."""
        if self.hosts:
            return self.names_host(call.host) and self._fits_endpoint(call)  # the host is the provider, by their word
        if call.provider is None:
            return False
        return self._fits_provider(call.provider) and self._fits_endpoint(call)

    def fits_model(self, model: str | None) -> bool:
        if not self.models or model is None:
            return True
        plain = model.casefold()
        return any(fits_glob(glob, plain) for glob in self.models)

    def _fits_provider(self, provider: Provider) -> bool:
        if self.provider == _COMPATIBLE:
            return provider.system == "openai" and provider.name != "openai"
        return self.provider in (None, provider.system)

    def _fits_endpoint(self, call: LlmCall) -> bool:
        if not self.endpoints or not call.readings:
            return True
        return any(fits_glob(glob, path.casefold()) for glob in self.endpoints for path in call.readings)


_ANY: Final = (_Match(None, (), (), ()),)


@dataclass(frozen=True, slots=True)
class BudgetRule:
    """One compiled rule. route is namespace/name; digest names the rule's set of calls (budget.Account.rule)."""

    route: str
    index: int
    digest: str
    matches: tuple[_Match, ...]
    budgets: tuple[TokenBudget, ...]

    @property
    def label(self) -> str:
        """Return how it is named to people."""
        return f"AIProviderRoute {self.route} rules[{self.index}]"

    def may_fit(self, call: LlmCall) -> bool:
        """Say whether the call is this rule's, for some model."""
        return any(match.may_fit(call) for match in self.matches)

    def fits(self, call: LlmCall, model: str | None) -> bool:
        """Say whether the call is this rule's."""
        return any(match.may_fit(call) and match.fits_model(model) for match in self.matches)

    def fits_any_model(self, call: LlmCall) -> bool:
        """Say whether the call is this rule's whatever its model."""
        return any(match.may_fit(call) and not match.models for match in self.matches)

    def names_host(self, host: str) -> bool:
        """Say whether the rule lists the host."""
        return any(match.names_host(host) for match in self.matches)

    @property
    def max_output_tokens(self) -> int | None:
        """Return the tightest maxOutputTokensPerRequest."""
        given = [
            one.max_output_tokens_per_request for one in self.budgets if one.max_output_tokens_per_request is not None
        ]
        return min(given, default=None)

    @property
    def limits_usd(self) -> bool:
        """Say whether any budget limits money."""
        return any(one.max_usd_per_day is not None or one.max_usd_per_execution is not None for one in self.budgets)

    def charges(self, identity: Identity, day: str) -> tuple[Charge, ...]:
        """Return the accounts that a call of this run is charged to on this day, each once."""
        found = []
        for budget in self.budgets:
            daily = Account(self.route, self.digest, account_key(budget.key, identity), day)
            found.append(Charge(daily, budget.max_tokens_per_day, limit_to_nano(budget.max_usd_per_day)))
            if budget.max_tokens_per_execution is not None or budget.max_usd_per_execution is not None:
                run = Account(self.route, self.digest, account_key("agent", identity), run_window(identity))
                found.append(Charge(run, budget.max_tokens_per_execution, limit_to_nano(budget.max_usd_per_execution)))
        return merge_charges(found)


def run_window(identity: Identity) -> str:
    """Return the window of one execution: an invocation, or a run of a daemon."""
    return RUN_PREFIX + (identity.invocation_id or identity.sandbox_id)


def account_key(key: str, identity: Identity) -> str:
    """Return who shares the account. Without a value for its field a caller is one of those who have none."""
    if key == "agent":
        return f"agent:{identity.agent_namespace}/{identity.agent_name}"
    if key == "route":
        return key
    field = key.partition(".")[2]
    return f"{key}:{dict(identity.caller_fields).get(field, '')}"


def compile_rules(gateway: EgressGateway, routes: Sequence[AIProviderRoute]) -> tuple[BudgetRule, ...]:
    """Compile the rules of a gateway's routes, in the order in which they are tried."""
    ours = [
        route
        for route in routes
        if route.spec.gateway_ref.name == gateway.metadata.name
        and route.metadata.namespace == gateway.metadata.namespace
    ]
    return tuple(
        _compile(f"{route.metadata.namespace}/{route.metadata.name}", index, rule)
        for route in sorted(ours, key=lambda route: route.metadata.name)
        for index, rule in enumerate(route.spec.rules)
    )


def _compile(route: str, index: int, rule: AIRule) -> BudgetRule:
    matches = "\n".join(match.model_dump_json() for match in rule.matches)
    return BudgetRule(
        route,
        index,
        hashlib.sha256(matches.encode()).hexdigest()[:_DIGEST_CHARS],
        tuple(map(_Match.compile, rule.matches)) or _ANY,
        tuple(one.token_budget for one in rule.filters),
    )
