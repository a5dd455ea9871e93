"""What a LlamaIndex application does, in a process of its own: `python llama_index_client.py URL KEY MODEL ...`.

Prints one JSON object with what each call of each model gave; models may be as many as there are, three arguments each.
"""

# mypy: disable-error-code="import-not-found"
# It is checked in an environment without LlamaIndex, too.

import json
import sys
from typing import Any, Literal

from llama_index.core.base.llms.types import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Verdict(BaseModel):
    """A short structured answer."""

    verdict: Literal["yes", "no"]


def ask(url: str, key: str, model: str) -> dict[str, Any]:
    """Return what chat, stream_chat, complete, structured_predict and embeddings gave."""
    llm = OpenAILike(
        model=model,
        api_base=url + "/v1",
        api_key=key,
        is_chat_model=True,
        should_use_structured_outputs=True,
        max_tokens=16,
        temperature=0.0,
        max_retries=0,
        timeout=120.0,
    )
    messages = [ChatMessage(role="user", content="Say hello.")]
    answer = llm.chat(messages)
    deltas = [chunk.delta or "" for chunk in llm.stream_chat(messages)]
    completing = llm.model_copy(update={"is_chat_model": False})
    roomy = llm.model_copy(update={"max_tokens": 48})
    verdict = roomy.structured_predict(Verdict, PromptTemplate("Is water wet?"))
    embedding = OpenAILikeEmbedding(model_name=model, api_base=url + "/v1", api_key=key, max_retries=0)
    return {
        "chat": answer.message.content,
        "stream": deltas,
        "complete": completing.complete("Once upon").text,
        "verdict": verdict.verdict,
        "vectors": embedding.get_text_embedding_batch(["one text", "another text"]),
    }


if __name__ == "__main__":
    arguments = iter(sys.argv[1:])
    asked = list(zip(arguments, arguments, arguments, strict=True))
    print(json.dumps({model: ask(url, key, model) for url, key, model in asked}))
