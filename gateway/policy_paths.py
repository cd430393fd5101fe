"""Paths of the egress policy: patterns that must hold for each meaning of a request's path (core/url_paths.py)."""

from __future__ import annotations

from dataclasses import dataclass

from clrk.core.globs import fits_glob
from clrk.core.url_paths import path_readings


@dataclass(frozen=True, slots=True)
class PathPattern:
    """A prefix of whole segments (`/v1` fits `/v1` and `/v1/x`, not `/v1beta`), or with `*` a glob of the whole path.

    `*` stands for any characters, `/` too.
    """

    readings: tuple[str, ...]
    is_glob: bool

    @classmethod
    def compile(cls, pattern: str) -> PathPattern:
        """Compile a pattern that core.resources has checked to begin with `/`."""
        return cls(path_readings(pattern), "*" in pattern)

    def matches(self, readings: tuple[str, ...]) -> bool:
        """Say whether the pattern fits every reading of a path."""
        if not readings or not self.readings:
            return False
        fits = fits_glob if self.is_glob else _fits_prefix
        return all(fits(pattern, path) for pattern, path in zip(self.readings, readings, strict=True))


def _fits_prefix(prefix: str, path: str) -> bool:
    return path == prefix or path.startswith(prefix if prefix.endswith("/") else prefix + "/")
