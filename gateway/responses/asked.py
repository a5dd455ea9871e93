"""A background response as a run: a workflow of one call, with an open variable for each response that it refers to."""

from typing import Any

import msgspec

from gateway.responses.ids import is_id
from gateway.responses.references import hole_of
from semantic_vars.calls import Given, Llm, Workflow

OUTPUT = "output"
"""The variable that is the answer."""
APP = "responses"
"""The runs of responses have this for their ``app``."""

_ASKED = "request"


class Asked(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a response repeats of what it was asked; kept with its run. ``stream``: who asked wants to read along."""

    model: str
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    format: dict[str, Any] | None = None
    metadata: dict[str, str] = {}
    previous_response_id: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool = True
    stream: bool = False


class Question(msgspec.Struct, frozen=True):
    """A request, read: ``chat`` is the body of the chat that it means, its texts templates over ``references``, the ids
    of other responses."""

    asked: Asked
    chat: dict[str, Any]
    references: tuple[str, ...] = ()


class Conversation(msgspec.Struct, frozen=True):
    """What a response and those before it have said: messages whose texts are templates over ``references``."""

    messages: tuple[dict[str, Any], ...] = ()
    references: tuple[str, ...] = ()


def workflow_of(question: Question) -> Workflow:
    """Return the workflow that a question is."""
    kept = Given(value=msgspec.to_builtins(question.asked))
    waited = {response: Given(open=True) for response in question.references}
    return Workflow(
        calls=(Llm(id=OUTPUT, request=question.chat),),
        variables={_ASKED: kept, **waited},
        outputs=(OUTPUT,),
        objective=question.chat["forebay"].get("objective", "latency"),
        app=APP,
    )


def asked_of(workflow: Workflow) -> Asked | None:
    """Return what a response was asked; None of a workflow that is no response's."""
    given = workflow.variables.get(_ASKED)
    is_ours = (
        workflow.app == APP
        and given is not None
        and len(workflow.calls) == 1
        and isinstance(workflow.calls[0], Llm)
        and isinstance(workflow.calls[0].request.get("messages"), list)
        and workflow.outputs == (OUTPUT,)
    )
    try:
        return msgspec.convert(given.value, Asked) if is_ours and given is not None else None
    except msgspec.ValidationError:
        return None


def references_of(workflow: Workflow) -> tuple[str, ...]:
    """Return the ids of the responses that a response refers to."""
    return tuple(name for name, given in workflow.variables.items() if given.open and is_id(name))


def conversation_of(response: str, asked: Asked, workflow: Workflow) -> Conversation:
    """Return what is said up to the end of a response, less its instructions: those are of that response alone."""
    (call,) = workflow.calls
    assert isinstance(call, Llm)
    said = call.request["messages"][1 if asked.instructions else 0 :]
    answer = {"role": "assistant", "content": hole_of(response)}
    return Conversation((*said, answer), (*references_of(workflow), response))
