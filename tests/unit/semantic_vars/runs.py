"""Runs of workflows without anything real: an engine that is a function, a log in memory, and a client-side oracle."""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from core.errors import ForebayError
from semantic_vars import calls
from semantic_vars.budget import Spent
from semantic_vars.calls import Call, Workflow
from semantic_vars.events import (
    Abort,
    Done,
    Effect,
    Ended,
    Errand,
    Event,
    Failed,
    Prefill,
    Request,
    Resolved,
    Retried,
    Start,
    Tick,
    Work,
)  # fmt: skip
from semantic_vars.executor import Executor, Fact
from semantic_vars.template import form_of
from semantic_vars.transforms import TransformError
from semantic_vars.values import Value
from semantic_vars.variable import State

Engine = Callable[[Work], Value]
"""What a call comes to; it raises ``Broken`` for one that fails."""


class Broken(Exception):
    """A call has failed."""


class Guess:
    """Costs of calls: ten tokens for each of a model, a second each."""

    def most(self, work: Work) -> Spent:
        return Spent() if isinstance(work, Errand) else Spent(10, 0.1)

    def seconds(self, call: Call) -> float:
        return 1.0


def workflow(*given: Mapping[str, Any], **rest: Any) -> Workflow:
    """Return a workflow as it would come over the wire."""
    return msgspec.json.decode(msgspec.json.encode({"calls": given, **rest}), type=Workflow)


def llm(name: str, prompt: str, **rest: Any) -> dict[str, Any]:
    """Return a call to a model, as it is sent."""
    return {"kind": "llm", "id": name, "request": {"model": "m", "prompt": prompt}, **rest}


def said(work: Work) -> str:
    """Return the prompt of a call, or the arguments of a tool."""
    return str(work.body["prompt"]) if isinstance(work, Request) else str(work.arguments)


def echo(work: Work) -> Value:
    """Answer with the prompt in angle brackets."""
    return f"<{said(work)}>"


class Run:
    """One run, driven by hand. ``log`` is what was made durable; ``started`` the calls that have not answered."""

    def __init__(
        self, given: Workflow, *, engine: Engine = echo, facts: Mapping[str, Fact] | None = None, **rest: Any
    ) -> None:
        self.engine = engine
        self.now = 0.0
        self.log: dict[str, Fact] = dict(facts or {})
        self.started: dict[str, Start] = {}
        self.aborted: dict[tuple[str, int], Start] = {}
        self.starts: list[str] = []
        self.retried: list[Retried] = []
        self.resolved: dict[str, State] = {}
        self.ended: list[State] = []
        self.prefilled: dict[str, Request] = {}
        self.executor = Executor(given, Guess(), facts=self.log, **{"prefills": True, **rest})
        self._take(self.executor.begin(self.now))

    def on(self, event: Event) -> None:
        """Feed an event."""
        self._take(self.executor.on(event, self.now))

    def _take(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case Start():
                    assert effect.call not in self.started
                    self.started[effect.call] = effect
                    self.starts.append(effect.call)
                case Prefill():
                    assert effect.call not in self.prefilled
                    assert effect.call not in self.starts, "it needs that no more"
                    self.prefilled[effect.call] = effect.work
                case Abort():
                    self.aborted[effect.call, effect.epoch] = self.started.pop(effect.call)
                    assert self.aborted[effect.call, effect.epoch].epoch == effect.epoch
                case Resolved():
                    assert effect.variable not in self.resolved, f"{effect.variable} was set twice"
                    self.resolved[effect.variable] = effect.outcome.state
                    if effect.key is not None or effect.order:
                        self.log[effect.variable] = Fact(effect.outcome, effect.key, effect.order)
                case Retried():
                    self.retried.append(effect)
                case Ended():
                    self.ended.append(effect.state)

    def answer(self, path: str) -> None:
        """Let the engine answer a call that was started."""
        start = self.started.pop(path)
        try:
            self.on(Done(path, start.epoch, self.engine(start.work), Spent(4, 0.04)))
        except Broken as error:
            self.on(Failed(path, start.epoch, "engine", "broken", str(error), spent=Spent(2, 0.02)))

    def leave(self, path: str, epoch: int) -> None:
        """Let a call that was aborted end."""
        del self.aborted[path, epoch]
        self.on(Failed(path, epoch, "engine", "aborted", "aborted", spent=Spent(1, 0.01)))

    def finish(self, draw: random.Random | None = None) -> "Run":
        """Let everything answer, in the order in which it was started or in one that is drawn."""
        while self.step(draw):
            pass
        return self

    def step(self, draw: random.Random | None = None) -> bool:
        """Let one thing happen; False if nothing is left."""
        if self.aborted:
            self.leave(*next(iter(self.aborted)))
        elif self.started:
            paths = list(self.started)
            self.answer(draw.choice(paths) if draw is not None else paths[0])
        elif (at := self.executor.next_wakeup()) is not None and not self.ended:
            self.now = max(self.now, at)
            self.on(Tick())
        else:
            return False
        return True

    def value(self, name: str) -> Value:
        """Return the value of a variable, which has to be there."""
        outcome = self.executor.outcome(name)
        assert outcome.state is State.DONE, outcome
        return outcome.value


class Missing(Exception):
    """A variable has no value: it was skipped or has failed."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.state = state


class Oracle:
    """What a client would get that makes the calls one after the other, by the plain meaning of the graph."""

    def __init__(self, given: Workflow, engine: Engine) -> None:
        self._engine = engine
        self._names: dict[str, Value] = {
            name: one.value for name, one in given.variables.items() if one.value is not msgspec.UNSET
        }
        self._calls = {call.variable: call for call in given.calls}
        self._known: dict[str, Value | Missing] = {}

    def value(self, name: str) -> Value:
        """Return a variable's value, or raise ``Missing``."""
        return self._find(name, [(self._names, self._calls, self._known)])

    def _find(self, name: str, scopes: list[Any]) -> Value:
        for depth in range(len(scopes) - 1, -1, -1):
            names, given, known = scopes[depth]
            if name in names:
                return names[name]
            if name in given:
                if name not in known:
                    known[name] = self._settled(given[name], scopes[: depth + 1])
                if isinstance(known[name], Missing):
                    raise Missing(known[name].state)
                return known[name]
        raise KeyError(name)

    def _settled(self, call: Call, scopes: list[Any]) -> Value | Missing:
        try:
            return self._made(call, scopes)
        except (Broken, TransformError, ForebayError):
            missing = Missing(State.FAILED)
        except Missing as error:
            missing = error
        if missing.state is State.FAILED and call.on_error == "default":
            return call.default
        return Missing(State.SKIPPED) if missing.state is State.FAILED and call.on_error == "skip" else missing

    def _made(self, call: Call, scopes: list[Any]) -> Value:
        own = {call.item, "index"} if call.foreach is not None else set()
        self._check((form_of(_said(call)).names | form_of(call.foreach).names) - own, scopes)
        if call.foreach is None:
            return self._single(call, scopes)
        items = self._fill(call.foreach, scopes)
        one = msgspec.structs.replace(call, foreach=None)
        results = []
        for index, item in enumerate(items):
            inside = [*scopes, ({call.item: item, "index": index}, {}, {})]
            made = self._settled(one, inside)
            if isinstance(made, Missing):
                if made.state is State.FAILED:
                    raise made
                continue
            results.append(made)
        return results

    def _single(self, call: Call, scopes: list[Any]) -> Value:
        match call:
            case calls.Llm():
                return self._engine(Request("completions", self._fill(call.request, scopes), call.schema))
            case calls.Tool():
                return self._engine(Errand(call.server, self._fill(call.arguments, scopes)))
            case calls.Transform():
                return self._fill(call.value, scopes)
            case calls.Sub():
                return self._body(call.body, self._fill(call.inputs, scopes), scopes)
            case calls.Branch():
                if self._fill(call.condition, scopes):
                    return self._body(call.then, {}, scopes)
                if call.otherwise is None:
                    raise Missing(State.SKIPPED)
                return self._body(call.otherwise, {}, scopes)
            case calls.Loop():
                state = self._fill(call.state, scopes)
                assert call.max_iterations is not None
                for _ in range(call.max_iterations):
                    whole = {"next": call.next, "until": call.until, "result": call.result}
                    told = self._body(calls.Body(whole, call.calls), state, scopes)
                    if told["until"]:
                        break
                    state = told["next"]
                return told["result"]
            case _:
                raise AssertionError(call)

    def _body(self, body: calls.Body, given: Mapping[str, Value], scopes: list[Any]) -> Value:
        inside = [*scopes, (dict(given), {call.variable: call for call in body.calls}, {})]
        return self._fill(body.result, inside)

    def _check(self, names: Iterable[str], scopes: list[Any]) -> None:
        """Raise for what is missing, for a failure before what was skipped."""
        states = set()
        for name in names:
            try:
                self._find(name, scopes)
            except Missing as error:
                states.add(error.state)
        for state in (State.FAILED, State.SKIPPED):
            if state in states:
                raise Missing(state)

    def _fill(self, shape: Value, scopes: list[Any]) -> Value:
        self._check(form_of(shape).names, scopes)
        return form_of(shape).fill(lambda name: self._find(name, scopes))


def _said(call: Call) -> Value:
    match call:
        case calls.Llm():
            return call.request
        case calls.Transform():
            return call.value
        case calls.Branch():
            return call.condition
        case calls.Loop():
            return call.state
        case calls.Sub():
            return call.inputs
        case _:
            return None
