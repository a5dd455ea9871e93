"""The graph executor (Parrot, section 5.1) as a synchronous machine: events go in, effects come out.

It does no I/O and has no clock; the same events give the same effects. Readiness is per edge: a call counts the
variables that it waits for, and runs when the last has come. A variable is set once: what a call says is taken if it is
of the call's last start, and dropped else. Only what is wanted is made, and what nobody needs any more is aborted.

After a crash a new executor of the same workflow is given ``facts``: what calls that cost something had come to. A call
that becomes ready and finds its own, made of the same inputs, is not made again. So after an edit only those calls are
made whose inputs have changed.

Costs: O(1) for an event and each edge that it touches; memory for what runs, and for the values.
"""

import hashlib
import heapq
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Literal

import msgspec

from core.errors import Conflict, InvalidRequest, UnknownId
from semantic_vars import calls
from semantic_vars.budget import Pool, Spent
from semantic_vars.events import (
    Abort,
    Append,
    Cancel,
    Done,
    Effect,
    Ended,
    Errand,
    Event,
    Failed,
    Prefill,
    Put,
    Request,
    Resolved,
    Retried,
    Standing,
    Start,
    Tick,
    Want,
    Work,
)  # fmt: skip
from semantic_vars.graph import USUAL, Block, Bounds, Node, Reader, unused_of
from semantic_vars.inner import Contest, Elements, Inner, Iterations, Only
from semantic_vars.instance import Instance, Phase, Scope, Variable
from semantic_vars.objectives import Stage, deduce
from semantic_vars.ports import Estimate
from semantic_vars.prefixes import Segments, messages_of, ready_part
from semantic_vars.template import Template
from semantic_vars.transforms import TransformError
from semantic_vars.values import Value, size_of, text_of
from semantic_vars.variable import CANCELLED, SKIPPED, Failure, Outcome, State, done

_RESULT = calls.Transform(id="result", value=None)
_WORST = (State.FAILED, State.CANCELLED, State.SKIPPED, State.DONE, State.PENDING)
_FINE = _WORST.index(State.DONE)
_LATE_S = 1.0  # what is there sooner is not worth to be prepared for
_FEW = 16  # inputs of which are looked at each time; with more of them pending, the last is far away
_UNUSABLE = (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, msgspec.MsgspecError)


class Fact(msgspec.Struct, frozen=True):
    """What a call came to before, and of which inputs; or the value of a variable that somebody set (no key).

    ``order``: of a race, which of its bodies were first.
    """

    outcome: Outcome
    key: str | None = None
    order: tuple[int, ...] = ()


class Executor:
    """One run. ``begin`` comes first, then ``on`` for each event; both return what is to be done.

    ``facts`` are by the variable: ``plan``, ``map[3]``, ``loop#0/draft``. ``parallel``: how many calls may be under way
    at a time; ``spent``: what the run has used before; ``prefills``: whether to tell what prompts begin with before all
    of them is known. Raises ``InvalidRequest`` for a graph that cannot run.
    """

    def __init__(
        self,
        workflow: calls.Workflow,
        estimate: Estimate,
        *,
        bounds: Bounds = USUAL,
        facts: Mapping[str, Fact] = {},
        spent: Spent | None = None,
        parallel: int = 256,
        prefills: bool = False,
    ) -> None:
        self._workflow = workflow
        self._estimate = estimate
        self._bounds = bounds
        self._reader = Reader(bounds)
        self._facts = dict(facts)
        self._parallel = parallel
        self._prefills = prefills
        self._pool = Pool(workflow.budget, spent or Spent())
        self._scope = Scope()
        self._live: dict[str, Instance] = {}
        self._unset: set[str] = set()
        self._clients: dict[str, Instance] = {}
        self._criteria: dict[str, calls.Criteria] = {}
        self._due: dict[str, float] = {}
        self._ready: deque[Instance] = deque()
        self._num_running = 0
        self._leaving: dict[tuple[str, int], Spent] = {}
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._num_timers = 0
        self._todo: deque[Callable[[], None]] = deque()
        self._effects: list[Effect] = []
        self._standings: dict[str, Standing] | None = None
        self._left: Counter[str] = Counter()
        self._num_awaited = 0
        self._has_ended = False
        self._is_late = False
        self._late_at: float | None = None
        self._num_bytes = 0
        self._now = 0.0
        self._append(Append(workflow.calls, workflow.variables, workflow.outputs))

    # In and out

    def begin(self, now: float) -> list[Effect]:
        """Return what is to be done first."""
        self._now = now
        if self._workflow.deadline_s is not None:
            self._late_at = now + self._workflow.deadline_s
            self._at(self._workflow.deadline_s, self._run_late)
        return self._carry_on()

    def on(self, event: Event, now: float) -> list[Effect]:
        """Take an event, and return what is to be done.

        Raises for what was asked and cannot be: ``InvalidRequest`` for calls that cannot be appended, ``UnknownId`` for
        a variable or call that is not there, ``Conflict`` for a variable that is set; nothing has changed then.
        """
        self._now = now
        match event:
            case Append():
                self._append(event)
                self._has_ended = False  # what was asked for is answered, also where nothing is left to be done
            case Want(variable=name, criteria=criteria, deadline_s=deadline_s):
                self._want(name, criteria)
                if deadline_s is not None:
                    self._due[name] = min(now + deadline_s, self._due.get(name, math.inf))
                    self._standings = None
                self._has_ended = False
            case Done():
                self._done(event)
            case Failed():
                self._failed(event)
            case Put():
                self._put(event)
            case Cancel(calls=paths):
                self._cancel(paths)
                self._has_ended = False
            case Tick():
                pass
        return self._carry_on()

    def next_wakeup(self) -> float | None:
        """Return when a ``Tick`` is wanted, in the time of events."""
        return self._timers[0][0] if self._timers else None

    @property
    def spent(self) -> Spent:
        """What calls have used so far."""
        return self._pool.spent

    @property
    def num_running(self) -> int:
        """How many calls have been started and have not answered."""
        return self._num_running + len(self._leaving)

    @property
    def _num_working(self) -> int:
        return self._num_running - len(self._clients)  # what waits for the client takes nobody's place

    def criteria(self, variable: str) -> calls.Criteria | None:
        """Return how a variable of the run itself is wanted; None if nobody has asked for it."""
        return self._criteria.get(variable)

    def due(self, variable: str) -> float | None:
        """Return when a variable of the run itself is wanted, in the time of events; None if nobody has said."""
        return self._due.get(variable)

    def outcome(self, name: str) -> Outcome:
        """Return what became of a variable of the run itself. Raises ``UnknownId``."""
        return self._variable(name).outcome

    def _carry_on(self) -> list[Effect]:
        while self._timers and self._timers[0][0] <= self._now:
            heapq.heappop(self._timers)[2]()
        while True:
            while self._todo:
                self._todo.popleft()()
            self._start_ready()
            if not self._todo:
                break
        self._conclude()
        effects, self._effects = self._effects, []
        return effects

    def _conclude(self) -> None:
        if self._num_awaited:
            self._has_ended = False
        elif not self._has_ended and not self._leaving:  # what was aborted has yet to say what it has used
            self._has_ended = True
            wanted = {self._scope.variables[name].outcome.state for name in self._criteria}
            self._effects.append(Ended(next((state for state in _WORST if state in wanted), State.DONE)))

    def _at(self, after_s: float, act: Callable[[], None]) -> None:
        self._num_timers += 1
        heapq.heappush(self._timers, (self._now + after_s, self._num_timers, act))

    # The graph

    def _append(self, more: Append) -> None:
        there = self._scope.variables.keys()
        for name, given in more.variables.items():
            if name in there:
                raise Conflict(f"the variable {name!r} is there already")
            if given.open == (given.value is not msgspec.UNSET):
                raise InvalidRequest(f"the variable {name!r} needs a value, or to be open")
        nodes = self._reader.nodes(more.calls, frozenset(there | more.variables.keys()))
        made = {node.call.variable for node in nodes}
        for name in more.outputs:
            if name not in there and name not in more.variables and name not in made:
                raise InvalidRequest(f"outputs names the variable {name!r}, which no call makes and nobody gives")
        taken = {instance.path for instance in self._scope.instances}
        if double := next((node.call.id for node in nodes if node.call.id in taken), None):
            raise Conflict(f"the call {double!r} is there already")
        for name, given in more.variables.items():
            self._give(name, given)
        for node in nodes:
            self._enter(self._scope, node, "")
        self._standings = None
        for name in more.outputs or unused_of(nodes):
            self._want(name, self._workflow.objective)

    def _give(self, name: str, given: calls.Given) -> None:
        variable = self._scope.variables[name] = Variable(name)
        if not given.open:
            variable.outcome = done(given.value)
        elif (fact := self._facts.get(name)) is not None and fact.key is None:
            self._resolve(variable, fact.outcome)  # of a run before this one, perhaps: told and kept as this one's
        elif self._is_late:
            self._resolve(variable, Outcome(State.FAILED, failure=Failure("deadline", _TOO_LATE, name)))
        else:
            self._unset.add(name)

    def _enter(self, scope: Scope, node: Node, prefix: str) -> None:
        path = prefix + node.call.id
        instance = Instance(path, prefix + node.call.variable, node, scope)
        scope.instances.append(instance)
        scope.variables[node.call.variable] = instance.output
        self._live[path] = instance

    def _variable(self, name: str) -> Variable:
        variable = self._scope.variables.get(name)
        if variable is None:
            raise UnknownId(f"the run has no variable {name!r}")
        return variable

    def _want(self, name: str, criteria: calls.Criteria) -> None:
        variable = self._variable(name)
        if self._criteria.get(name) != "latency":
            self._criteria[name] = criteria
            self._standings = None
        self._num_awaited += variable.is_pending and not variable.is_wanted
        variable.is_wanted = True
        if variable.producer is not None:
            self._todo.append(partial(self._activate, variable.producer))

    # From idle to ready

    def _activate(self, instance: Instance) -> None:
        waiting = [instance]
        while waiting:
            one = waiting.pop()
            if one.phase is not Phase.IDLE:
                continue
            if (fact := self._facts.get(one.output.path)) is not None and fact.outcome.state is State.CANCELLED:
                self._todo.append(partial(self._stop, one, CANCELLED))  # also what it alone would need stays unmade
                continue
            one.phase = Phase.WAITING
            is_lazy = isinstance(one.node.call, calls.Branch)  # which body it takes is not known yet
            for name in one.node.uses:
                variable = one.scope.find(name)
                variable.num_needed += 1
                if variable.producer is not None and not (is_lazy and name not in one.node.inputs):
                    waiting.append(variable.producer)
                if name in one.node.inputs and variable.is_pending:
                    one.unmet += 1
                    variable.consumers.append(one)
            if not one.unmet:
                self._todo.append(partial(self._perform, one))

    def _heard(self, instance: Instance, variable: Variable) -> None:
        if instance.phase is Phase.OPEN:
            inner: Inner = instance.inner
            if isinstance(inner, Elements) and variable.producer is not None:
                del instance.scopes[variable.producer.scope]  # a long list costs memory for its values alone
            inner.heard(variable)
        elif instance.phase is Phase.WAITING:
            instance.unmet -= 1
            # What has failed tells at once; what was skipped waits, since another input may yet fail: so it is the same
            # whichever comes first.
            if not instance.unmet or variable.outcome.state in {State.FAILED, State.CANCELLED}:
                self._perform(instance)
            elif self._prefills:
                self._prefill(instance)

    def _perform(self, instance: Instance) -> None:
        """Do what a call does whose variables are there; or end it if one will never be."""
        if instance.phase is not Phase.WAITING:
            return
        node = instance.node
        outcomes = {name: instance.scope.find(name).outcome for name in sorted(node.inputs)}
        if (worst := min(outcomes.values(), key=_badness, default=None)) is not None and _badness(worst) < _FINE:
            self._end(instance, _upstream(worst))
            return
        for name, outcome in outcomes.items():
            if outcome.total and outcome.total - outcome.missing < node.call.min_inputs * outcome.total:
                told = f"of {name!r} {outcome.missing} of {outcome.total} are missing, more than min_inputs allows"
                self._fail(instance, "min_inputs", told)
                return
        try:
            if node.each is not None:
                self._open_map(instance, node.each.fill(instance.scope.value))
            else:
                self._do(instance, node.call)
        except TransformError as error:
            self._fail(instance, "transform", str(error))
        except _UNUSABLE as error:  # values may be anything, and a run that breaks its executor would never end
            self._fail(instance, "unusable", f"what its inputs come to cannot be used: {str(error)[:200]}")

    def _open_map(self, instance: Instance, items: Value) -> None:
        if not isinstance(items, list):
            self._fail(instance, "no_list", f"foreach is no list: {str(items)[:60]!r}")
        elif len(items) > self._bounds.width:
            self._fail(
                instance, "too_wide", f"foreach has {len(items)} elements; at most {self._bounds.width} are allowed"
            )
        else:
            self._open(instance, Elements(self, instance, items))

    def _do(self, instance: Instance, call: calls.Call) -> None:
        node, value = instance.node, instance.scope.value
        match call:
            case calls.Llm() | calls.Embed() | calls.Tool():
                self._prepare(instance, _work_of(node, call, value))
            case calls.Transform():
                self._end(instance, done(node.form.fill(value)))
            case calls.Branch():
                is_true = bool(node.form.fill(value))
                if not is_true and call.otherwise is None:
                    self._end(instance, SKIPPED)
                else:
                    name, block = ("#then", node.blocks[0]) if is_true else ("#else", node.blocks[1])
                    self._open(instance, Only(self, instance, name, block, {}))
            case calls.Sub():
                self._open(instance, Only(self, instance, "", node.blocks[0], node.form.fill(value)))
            case calls.Loop():
                self._open(instance, Iterations(self, instance, call, node.form.fill(value)))
            case calls.Race():
                fact = self._facts.get(instance.output.path)
                self._open(instance, Contest(self, instance, call, fact.order if fact is not None else ()))

    def _open(self, instance: Instance, inner: Inner) -> None:
        instance.phase, instance.inner = Phase.OPEN, inner
        inner.begin()

    def _prepare(self, instance: Instance, work: Work) -> None:
        instance.work = work
        fact = self._facts.pop(instance.output.path, None)
        if fact is not None and fact.key == key_of(work):
            self._end(instance, fact.outcome)
            return
        instance.phase = Phase.READY
        self._ready.append(instance)

    # From ready to ended

    def _start_ready(self) -> None:
        while self._ready and self._num_working < self._parallel:
            instance = self._ready[0]
            if instance.phase is not Phase.READY:
                self._ready.popleft()
                continue
            if self._is_late:
                self._ready.popleft()
                self._fail(instance, "deadline", _TOO_LATE)
                continue
            most = self._estimate.most(instance.work)
            if not self._pool.reserve(most):
                if self._num_working or self._leaving:
                    return  # what it has set aside may not be used
                self._ready.popleft()
                self._fail(instance, "budget_exhausted", self._pool.told(most))
                continue
            self._ready.popleft()
            self._start(instance, most)

    def _start(self, instance: Instance, most: Spent) -> None:
        instance.phase, instance.reserved = Phase.RUNNING, most
        instance.epoch += 1
        instance.attempts += 1
        self._num_running += 1
        if isinstance(instance.work, Errand) and isinstance(instance.work.server, calls.Client):
            self._clients[instance.output.path] = instance
        timeout_s = instance.node.call.timeout_s
        standing = self._standing(instance)
        start = Start(instance.path, instance.output.path, instance.epoch, instance.work, standing, timeout_s)
        self._effects.append(start)
        if self._prefills:
            for consumer in instance.output.consumers:
                self._prefill(consumer)

    def _prefill(self, instance: Instance) -> None:
        """Have the beginning of a call's prompt computed while the last of its inputs are made. Once for a call."""
        node = instance.node
        is_able = instance.phase is Phase.WAITING and isinstance(node.call, calls.Llm) and node.each is None
        if not is_able or instance.has_prefilled or not 0 < instance.unmet <= _FEW:
            return
        pending = [one for name in node.inputs if (one := instance.scope.find(name)).is_pending]
        producers = [one.producer for one in pending if one.producer is not None]
        if len(producers) < len(pending) or any(one.phase is not Phase.RUNNING for one in producers):
            return  # that may take as long as it likes
        if max((self._estimate.seconds(one.node.call) for one in producers), default=0.0) < _LATE_S:
            return
        missing = {name for name in node.inputs if instance.scope.find(name).is_pending}
        try:
            ready = ready_part(node.form, instance.scope.value, lambda name: name not in missing)
        except TransformError:
            return  # the call itself will tell
        if ready is not None:
            instance.has_prefilled = True
            endpoint: Literal["chat", "completions"] = "chat" if "messages" in ready.body else "completions"
            self._effects.append(Prefill(instance.path, Request(endpoint, ready.body, None, ready.beginnings)))

    def _answered(self, path: str, epoch: int, spent: Spent) -> Instance | None:
        """Book what a start has come to; return its instance unless that has gone on without it."""
        instance = self._live.get(path)
        if instance is not None and instance.phase is Phase.RUNNING and instance.epoch == epoch:
            self._clients.pop(instance.output.path, None)
            self._pool.settle(instance.reserved, spent)
            self._num_running -= 1
            return instance
        if (reserved := self._leaving.pop((path, epoch), None)) is not None:
            self._pool.settle(reserved, spent)
        return None

    def _done(self, event: Done) -> None:
        if (instance := self._answered(event.call, event.epoch, event.spent)) is not None:
            self._end(instance, done(event.value))

    def _failed(self, event: Failed) -> None:
        instance = self._answered(event.call, event.epoch, event.spent)
        if instance is None:
            return
        retry = instance.node.call.retry
        if not event.can_retry or event.cause not in retry.on or instance.attempts > retry.max:
            self._fail(instance, event.code, event.message)
            return
        instance.phase = Phase.WAITING
        self._effects.append(Retried(instance.path, instance.attempts, event.code, event.message))
        self._at(retry.backoff_s * 2.0 ** (instance.attempts - 1), partial(self._again, instance))

    def _again(self, instance: Instance) -> None:
        if instance.phase is Phase.WAITING:
            instance.phase = Phase.READY
            self._ready.append(instance)

    def _put(self, put: Put) -> None:
        name, value = put.variable, put.value
        if (instance := self._clients.get(name)) is not None:
            if put.failure is None:
                self._done(Done(instance.path, instance.epoch, value))
            else:
                self._failed(Failed(instance.path, instance.epoch, "tool", "tool_failed", put.failure))
            return
        variable = self._variable(name)
        if name not in self._unset:
            raise Conflict(f"the variable {name!r} is not open: a variable is set once, by its call or from outside")
        if (size := size_of(value)) > self._bounds.value:
            raise InvalidRequest(f"the value of {name!r} has {size} bytes; at most {self._bounds.value} are allowed")
        self._unset.discard(name)
        failure = Failure("set", put.failure, name) if put.failure is not None else None
        self._resolve(variable, Outcome(State.FAILED, failure=failure) if failure is not None else done(value))

    def _fail(self, instance: Instance, code: str, message: str) -> None:
        self._end(instance, Outcome(State.FAILED, failure=Failure(code, message, instance.path)))

    def _end(self, instance: Instance, outcome: Outcome, order: tuple[int, ...] = ()) -> None:
        """Give an instance its outcome, and let go of all that was only for it."""
        if instance.phase is Phase.ENDED:
            return
        call = instance.node.call
        if outcome.state is State.DONE and instance.inner is None and (told := self._too_large(outcome.value)):
            outcome = Outcome(State.FAILED, failure=Failure("value_too_large", told, instance.path))
        if outcome.state is State.FAILED and call.on_error != "fail":
            is_skipped = call.on_error == "skip"
            outcome = Outcome(
                State.SKIPPED if is_skipped else State.DONE, None if is_skipped else call.default, outcome.failure
            )
        was_idle = instance.phase is Phase.IDLE
        instance.phase, instance.inner = Phase.ENDED, None
        self._live.pop(instance.path, None)
        self.close(instance)
        if not was_idle:
            self._release(instance)
        if (group := self._group(instance)) is not None:
            self._left[group] -= 1
        key = key_of(instance.work) if instance.work is not None and outcome.state is not State.CANCELLED else None
        self._resolve(instance.output, outcome, key, order)
        instance.work = None

    def _too_large(self, value: Value) -> str | None:
        """Count a value; return what is to be said if it is too large, or all together are."""
        size = size_of(value)
        if size > self._bounds.value:
            return f"its value has {size} bytes; at most {self._bounds.value} are allowed"
        self._num_bytes += size
        if self._num_bytes > self._bounds.total:
            return f"the values of the run have more than {self._bounds.total} bytes"
        return None

    def _resolve(
        self, variable: Variable, outcome: Outcome, key: str | None = None, order: tuple[int, ...] = ()
    ) -> None:
        variable.outcome = outcome
        self._num_awaited -= variable.is_wanted
        if not variable.path.endswith("/"):  # the result of a body is its owner's
            call = variable.producer.path if variable.producer is not None else None
            self._effects.append(Resolved(variable.path, call, outcome, key, order))
        consumers, variable.consumers = variable.consumers, []
        self._todo.extend(partial(self._heard, consumer, variable) for consumer in consumers)

    def _release(self, instance: Instance) -> None:
        """Cancel what nobody else needs."""
        for variable in instance.uses():
            variable.num_needed -= 1
            producer = variable.producer
            if producer is None or variable.num_needed or variable.is_wanted or producer.phase in _OUTSIDE:
                continue
            self._todo.append(partial(self._stop_unneeded, producer))

    def _stop_unneeded(self, instance: Instance) -> None:
        if not instance.output.num_needed and not instance.output.is_wanted:
            self._stop(instance, CANCELLED)

    def _stop(self, instance: Instance, outcome: Outcome) -> None:
        if instance.phase is Phase.RUNNING:
            self._clients.pop(instance.output.path, None)
            self._effects.append(Abort(instance.path, instance.epoch))
            self._leaving[instance.path, instance.epoch] = instance.reserved
            self._num_running -= 1
        self._end(instance, outcome)

    def _cancel(self, paths: Sequence[str]) -> None:
        if not paths:
            self._stop_all(State.CANCELLED)
            return
        known = {instance.path for instance in self._scope.instances} | self._live.keys()
        for path in paths:
            if path not in known:
                raise UnknownId(f"the run has no call {path!r}")
        for path in paths:
            if (instance := self._live.get(path)) is not None:
                self._stop(instance, CANCELLED)

    def _run_late(self) -> None:
        self._is_late = True
        self._stop_all(State.FAILED, "deadline", f"the run has not ended within {self._workflow.deadline_s:g} s")

    def _stop_all(self, state: State, code: str = "", message: str = "") -> None:
        """End all that runs or waits."""
        for instance in list(self._live.values()):
            failure = Failure(code, message, instance.path) if code else None
            if instance.phase is not Phase.IDLE or state is State.CANCELLED:
                self._stop(instance, Outcome(state, failure=failure))
        for name in sorted(self._unset):
            failure = Failure(code, message, name) if code else None
            self._resolve(self._scope.variables[name], Outcome(state, failure=failure))
        self._unset.clear()

    # What an inner asks for

    def open(self, owner: Instance, name: str, block: Block, given: Mapping[str, Value]) -> Variable:
        """Run a block; see ``House``."""
        scope = self._within(owner, given)
        for node in block.nodes:
            self._enter(scope, node, f"{owner.path}{name}/")
        last = Node(_RESULT, block.result, None, (), block.result.names, frozenset())
        path = f"{owner.path}{name}/"
        return self._follow(owner, Instance(path, path, last, scope))

    def element(self, owner: Instance, node: Node, index: int, given: Mapping[str, Value]) -> Variable:
        """Run one call of a map; see ``House``."""
        path, output = f"{owner.path}[{index}]", f"{owner.output.path}[{index}]"
        instance = Instance(path, output, node, self._within(owner, given))
        self._live[instance.path] = instance
        return self._follow(owner, instance)

    def _within(self, owner: Instance, given: Mapping[str, Value]) -> Scope:
        scope = Scope(owner.scope)
        for name, value in given.items():
            scope.variables[name] = Variable(name, outcome=done(value))
        return scope

    def _follow(self, owner: Instance, instance: Instance) -> Variable:
        owner.scopes[instance.scope] = None
        instance.scope.instances.append(instance)
        instance.output.consumers.append(owner)
        instance.output.num_needed += 1
        self._todo.append(partial(self._activate, instance))
        return instance.output

    def close(self, owner: Instance) -> None:
        """Cancel what runs within; see ``House``."""
        scopes, owner.scopes = owner.scopes, {}
        for scope in scopes:
            for instance in scope.instances:
                if instance.phase is not Phase.ENDED:
                    self._todo.append(partial(self._stop, instance, CANCELLED))

    def settle(self, owner: Instance, outcome: Outcome, order: tuple[int, ...] = ()) -> None:
        """End an owner; see ``House``."""
        self._end(owner, outcome, order)

    def wake(self, owner: Instance, after_s: float) -> None:
        """Wake an owner; see ``House``."""

        def woken() -> None:
            if owner.phase is Phase.OPEN:
                owner.inner.woken()

        self._at(after_s, woken)

    # What calls are for

    def _standing(self, instance: Instance) -> Standing:
        standings = self._deduced()
        standing = standings.get(_top(instance.path), Standing())
        ends = [at for at in (self._late_at, standing.due) if at is not None]
        if ends:
            standing = msgspec.structs.replace(standing, left_s=max(0.0, min(ends) - self._now))
        if standing.group is not None and self._left[standing.group] <= 1:
            return msgspec.structs.replace(standing, criteria="latency")  # the last of its group
        return standing

    def _group(self, instance: Instance) -> str | None:
        """Return the group that an instance counts in: elements do for a map, and it does not itself."""
        is_counted = "/" not in instance.path and instance.node.each is None and self._standings is not None
        standing = self._deduced().get(_top(instance.path)) if is_counted else None
        return standing.group if standing is not None else None

    def _deduced(self) -> dict[str, Standing]:
        if self._standings is None:
            waiting = [one for one in self._scope.instances if one.phase not in _OUTSIDE]
            self._standings = deduce(self._stages(waiting))
            self._left.clear()
            for instance in waiting:
                group = self._standings[instance.path].group
                if group is not None:
                    self._left[group] += _num_left(instance)
        return self._standings

    def _stages(self, instances: Iterable[Instance]) -> dict[str, Stage]:
        consumers: dict[str, list[str]] = defaultdict(list)
        for instance in instances:
            for name in instance.node.uses:
                consumers[name].append(instance.path)
        return {
            instance.path: Stage(
                tuple(consumers[instance.node.call.variable]),
                self._criteria.get(instance.node.call.variable),
                self._estimate.seconds(instance.node.call),
                _num_left(instance),
                self._due.get(instance.node.call.variable),
            )
            for instance in instances
        }


def _badness(outcome: Outcome) -> int:
    return _WORST.index(outcome.state)


_OUTSIDE = (Phase.IDLE, Phase.ENDED)
_TOO_LATE = "the run's deadline has passed"


def _top(path: str) -> str:
    """Return the call of the run itself that a path is in."""
    for at, letter in enumerate(path):
        if letter in "[#/":
            return path[:at]
    return path


def _num_left(instance: Instance) -> int:
    if isinstance(instance.inner, Elements):
        return instance.inner.num_left
    return 2 if instance.node.each is not None else 1  # how long its list is is not known yet


def _upstream(outcome: Outcome) -> Outcome:
    failure = outcome.failure
    if outcome.state is not State.FAILED or failure is None:
        return Outcome(outcome.state)
    if failure.code == "upstream_failed":
        return outcome
    told = f"{failure.call} has failed ({failure.code}): {failure.message}"
    return Outcome(State.FAILED, failure=Failure("upstream_failed", told, failure.call))


def _work_of(node: Node, call: calls.Llm | calls.Embed | calls.Tool, lookup: Callable[[str], Value]) -> Work:
    segments = Segments()
    said = node.form.fill(lookup, segments)
    match call:
        case calls.Llm(schema=schema):
            _make_texts(node.form.shape, said)
            endpoint: Literal["chat", "completions"] = "chat" if "messages" in said else "completions"
            return Request(endpoint, said, schema, segments.beginnings(node.form))
        case calls.Embed():
            return Request("embeddings", said, None)
        case calls.Tool():
            return Errand(msgspec.convert(_texts(said["server"]), calls.Server), said["arguments"], call.at_most_once)


def _texts(said: Value) -> Value:
    """Return a tool's server with all that was filled in as text, as addresses and headers are."""
    return {name: _texts(one) if name == "headers" else text_of(one) for name, one in said.items()}


def _make_texts(shape: Value, said: Value) -> None:
    """Have what stands in a prompt be text, also where a hole is all there is and its value is none."""
    for name in ("prompt", "content"):
        if isinstance(shape.get(name), Template):
            said[name] = text_of(said[name])
    if isinstance(shape.get("messages"), Template) and not isinstance(said["messages"], list):
        raise TransformError(f"messages has to be a list, and this is {text_of(said['messages'])[:60]!r}")
    for of_message, message in zip(messages_of(shape), said.get("messages") or (), strict=False):
        if isinstance(of_message, dict):
            _make_texts(of_message, message)


def key_of(work: Work) -> str:
    """Return a digest of all that what a call comes to depends on: what it is, and the values of its inputs."""
    said = [work.body, work.endpoint, work.schema] if isinstance(work, Request) else [work.server, work.arguments]
    return hashlib.sha256(msgspec.json.encode(said, order="sorted")).hexdigest()
