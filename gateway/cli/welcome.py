"""What ``forebay run`` says once it is ready."""

import json

from gateway.cli.machine import Advice


def welcome(*, data_url: str, admin_url: str, key: str, models: list[str], advice: Advice | None, program: str) -> str:
    """Return the block: address, key, a curl line and five lines of Python that work when pasted, and what next.

    The lines to paste start in the first column: Python takes them in no other way.
    """
    base = data_url.rstrip("/").removesuffix("/v1") + "/v1"
    model = models[0]
    names = ", ".join(models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
    parts = [
        f"Forebay is ready.  {base}   model{'s' if len(models) > 1 else ''}: {names}\n"
        f"Your key: {key}   (again: {program} keys show-local)\n"
        f"Admin:    {admin_url}   ({program} workers ls)",
        f"Try it:\n\n{curl_line(base, key, model)}",
        f"Or in Python, after `pip install openai`:\n\n{python_lines(base, key, model)}",
    ]
    if advice is not None:
        parts.append(
            "SmolLM2-135M is a toy to try the plumbing with: it talks nonsense.\n"
            f"A good model for this machine ({advice.reason}):\n\n"
            f"{program} {advice.arguments}"
        )
    parts.append("Ctrl-C stops it.")
    return "\n\n".join(parts) + "\n"


def curl_line(base: str, key: str, model: str) -> str:
    """Return one shell line that asks ``model`` something."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 60})
    return (
        f"curl {base}/chat/completions -H 'Authorization: Bearer {key}' -H 'Content-Type: application/json' -d '{body}'"
    )


def python_lines(base: str, key: str, model: str) -> str:
    """Return five lines for a Python prompt or file that print an answer of ``model``."""
    return "\n".join(
        (
            "from openai import OpenAI",
            f'client = OpenAI(base_url="{base}", api_key="{key}")',
            'messages = [{"role": "user", "content": "Say hello."}]',
            f'answer = client.chat.completions.create(model="{model}", messages=messages, max_tokens=60)',
            "print(answer.choices[0].message.content)",
        )
    )
