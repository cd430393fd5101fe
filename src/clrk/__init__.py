"""clrk: a Linux-native runtime for LLM agents that attributes every call to the request that caused it."""

__version__ = "0.1.0"
