"""What LLM calls say about themselves: request settings, usage, finish reasons, errors, cost.

Pure and incremental: bytes go in as they pass, facts come out at the end; nothing here raises on hostile input, delays
a byte or does I/O. `interpreter.py` follows the exchange, a dialect (`anthropic.py`, `openai_chat.py`) reads one API.
"""
