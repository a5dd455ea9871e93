"""What the llama.cpp driver hides, seen from the client's side of the gateway."""

from tests.e2e.asking import Kind, ask, kinds
from tests.fakes.gateway import GatewayProcess


async def test_no_answer_needs_a_second_try_because_the_engine_closed_its_connection(
    real_gateway: GatewayProcess,
) -> None:
    counting = Kind("count", "/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "Hi."}]})
    attempts = []
    for kind in [*kinds("Hi."), counting] * 3:
        limit = {"max_output_tokens": 2} if kind.name.startswith("responses") else {"max_tokens": 2}
        answer = await ask(real_gateway, kind.path, {"model": "smollm2", **kind.body, **limit})
        assert answer.status == 200, (kind.name, answer.body)
        attempts.append(answer.headers.get("x-forebay-attempts", "1"))

    assert set(attempts) == {"1"}


async def test_a_text_too_long_to_embed_is_the_callers_to_shorten(real_gateway: GatewayProcess) -> None:
    answer = await ask(real_gateway, "/v1/embeddings", {"model": "smollm2", "input": "river " * 400})

    assert (answer.status, answer.json["error"]["code"]) == (400, "context_length_exceeded")
