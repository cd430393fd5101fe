"""For every test: hypothesis judges what the code does, not how busy the machine is."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

settings.register_profile("clrk", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("clrk")
