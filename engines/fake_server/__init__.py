"""A tiny deterministic engine that speaks the OpenAI, Anthropic and vLLM shapes and misbehaves on request.

Tests, demos and benchmarks put it where a real engine would stand: `python -m engines.fake_server --port 0`.
The same prompt always gets the same answer, in this process and in any other started with the same flags, and
prompt + emitted tokens gets the rest of that answer; so a continued stream can be compared byte for byte.
"""
