"""Applications as data: graphs of prompts with the true flow of values, and answers of forced length.

Every client carries out the same graphs. Texts are drawn from the seed that stands in the workload. ``mark`` begins
every prompt: an engine that has served the same workload before must not know it from then. It has the same length
whatever it is, and so do all prompts.
"""

import random
from collections.abc import Iterable, Sequence

import msgspec

_WORDS = (
    "sluice", "weir", "intake", "gauge", "spill", "draft", "rack", "gate", "flume", "crest", "surge", "head",
    "runner", "tail", "vane", "scroll", "shaft", "guide", "water", "level", "flow", "power", "dam", "lock",
)  # fmt: skip


class Of(msgspec.Struct, frozen=True):
    """The value of another node, or of a loop's state, in a prompt."""

    name: str


Piece = str | Of


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """A call of a model: ``tokens`` is how long its answer is."""

    name: str
    prompt: tuple[Piece, ...]
    tokens: int
    system: str = ""


class Tool(msgspec.Struct, frozen=True, tag="tool"):
    """Something that the application's own process does with a value, in so many seconds."""

    name: str
    of: str
    seconds: float


class Loop(msgspec.Struct, frozen=True, tag="loop"):
    """Nodes done again until the tool ``until`` is content, which it is the ``times``-th time.

    ``state`` is a name inside; its first value is that of ``begins``, and later that of ``next``, which is a node of
    the body, and the loop's value in the end.
    """

    name: str
    state: str
    begins: str
    body: "tuple[Ask | Tool, ...]"
    next: str
    until: str
    times: int


Node = Ask | Tool | Loop


class App(msgspec.Struct, frozen=True):
    """One run of an application: who starts it when (seconds from the start), and the node whose value is wanted.

    Nodes stand behind those that they use. ``session``: what a client that cares for prefix caches goes by: prompts of
    one session begin alike. ``objective``: what its user would tell a gateway.
    """

    name: str
    at: float
    nodes: tuple[Node, ...]
    output: str
    session: str
    objective: str = "latency"


class Chat(msgspec.Struct, frozen=True):
    """Somebody who talks to the model beside the applications, and reads the answer as it comes."""

    at: float
    prompt: str
    tokens: int


class Workload(msgspec.Struct, frozen=True):
    """All that is asked in one cell."""

    name: str
    seed: int
    apps: tuple[App, ...]
    chats: tuple[Chat, ...] = ()

    @property
    def num_calls(self) -> int:
        """How many calls of a model the applications make."""
        return sum(_calls(app.nodes) for app in self.apps)


def _calls(nodes: Iterable[Node]) -> int:
    count = 0
    for node in nodes:
        if isinstance(node, Ask):
            count += 1
        elif isinstance(node, Loop):
            count += node.times * _calls(node.body)
    return count


def needs(node: Node) -> tuple[str, ...]:
    """Return the names of the values that a node uses, each once; a loop's without those that it makes itself."""
    match node:
        case Ask():
            names = [piece.name for piece in node.prompt if isinstance(piece, Of)]
        case Tool():
            names = [node.of]
        case Loop():
            inner = {node.state, *(one.name for one in node.body)}
            names = [node.begins, *(name for one in node.body for name in needs(one) if name not in inner)]
    return tuple(dict.fromkeys(names))


class _Text:
    """Draws texts. ``mark`` is what begins the first prompts of each application."""

    def __init__(self, seed: int, mark: str) -> None:
        self._draw = random.Random(seed)
        self.mark = f"[{mark}] "

    def words(self, count: int) -> str:
        return " ".join(self._draw.choices(_WORDS, k=count))

    def times(self, count: int, per_s: float) -> list[float]:
        """Return when so many arrive, Poisson."""
        at, times = 0.0, []
        for _ in range(count):
            times.append(at)
            at += self._draw.expovariate(per_s)
        return times


def chains(
    mark: str, *, apps: int, steps: int, words: int, tokens: int, spread_s: float = 0.0, seed: int = 1
) -> Workload:
    """Return documents that are summarized piece by piece, each step over the summary of the last.

    All start within ``spread_s``, evenly.
    """
    text = _Text(seed, mark)
    made = []
    for number in range(apps):
        nodes: list[Node] = []
        for step in range(steps):
            before: tuple[Piece, ...] = ("Existing summary: ", Of(f"s{step - 1}"), "\n") if step else ()
            chunk = f"More context:\n{text.words(words)}\nRefined summary:"
            nodes.append(Ask(f"s{step}", (f"{text.mark}{number:03} ", *before, chunk), tokens))
        name = f"chain{number}"
        made.append(App(name, spread_s * number / apps, tuple(nodes), f"s{steps - 1}", name))
    return Workload("chain" if apps == 1 else "chains", seed, tuple(made))


def map_reduce(
    mark: str, *, width: int, words: int, tokens: int, last: int, apps: int = 1, per_s: float = 1.0, seed: int = 2,
    objective: str = "latency",
) -> Workload:  # fmt: skip
    """Return documents whose ``width`` pieces are summarized each by itself, and then put together."""
    text = _Text(seed, mark)
    made = []
    for number, at in enumerate(text.times(apps, per_s)):
        nodes: list[Node] = [
            Ask(f"m{item}", (f"{text.mark}{number:03}/{item:03} Summarize:\n{text.words(words)}",), tokens)
            for item in range(width)
        ]
        parts: list[Piece] = [f"{text.mark}{number:03} Combine:"]
        for item in range(width):
            parts += ["\n", Of(f"m{item}")]
        nodes.append(Ask("all", tuple(parts), last))
        made.append(App(f"map{number}", at, tuple(nodes), "all", f"map{number}", objective))
    return Workload("map_reduce", seed, tuple(made))


def shared_prefix(
    mark: str, *, prefixes: int, users: int, prefix_words: int, words: int, tokens: int, per_s: float, seed: int = 3
) -> Workload:
    """Return assistants with a long system prompt each; ``users`` of each ask two questions, the second about the
    answer to the first. They come in an order of chance."""
    text = _Text(seed, mark)
    systems = [f"{text.mark}You are assistant {number}. {text.words(prefix_words)}" for number in range(prefixes)]
    order = [number for number in range(prefixes) for _ in range(users)]
    random.Random(seed).shuffle(order)
    made = []
    for number, (at, which) in enumerate(zip(text.times(len(order), per_s), order, strict=True)):
        nodes = (
            Ask("q", (f"Question {number}: {text.words(words)}",), tokens, systems[which]),
            Ask("r", ("You said: ", Of("q"), f"\nNow {text.words(words)}?"), tokens, systems[which]),
        )
        made.append(App(f"user{number}", at, nodes, "r", f"prefix{which}"))
    return Workload("shared_prefix", seed, tuple(made))


def multi_agent(
    mark: str, *, apps: int, coders: int, rounds: int, words: int, tokens: int, per_s: float, seed: int = 4
) -> Workload:
    """Return teams: an architect plans, coders write a file each, and in every round a reviewer reads all files and
    each coder revises its own. All prompts of a team begin with its task."""
    text = _Text(seed, mark)
    made = []
    for number, at in enumerate(text.times(apps, per_s)):
        task = f"{text.mark}Task {number:03}: {text.words(words)}"
        nodes: list[Node] = [Ask("plan", ("You are the architect. Plan the files.",), tokens, task)]
        files = [f"c{coder}r0" for coder in range(coders)]
        nodes += [
            Ask(name, ("You write code. The plan: ", Of("plan"), f"\nWrite file {coder}: {text.words(words // 4)}"),
                tokens, task)
            for coder, name in enumerate(files)
        ]  # fmt: skip
        for turn in range(1, rounds + 1):
            pieces: list[Piece] = ["You review code."]
            for name in files:
                pieces += ["\nFile: ", Of(name)]
            nodes.append(Ask(f"review{turn}", tuple(pieces), tokens, task))
            before, files = files, [f"c{coder}r{turn}" for coder in range(coders)]
            nodes += [
                Ask(
                    name, ("You revise code. Your file: ", Of(old), "\nThe review: ", Of(f"review{turn}")), tokens, task
                )
                for name, old in zip(files, before, strict=True)
            ]
        last: list[Piece] = ["You release code."]
        for name in files:
            last += ["\nFile: ", Of(name)]
        nodes.append(Ask("release", tuple(last), tokens, task))
        made.append(App(f"team{number}", at, tuple(nodes), "release", f"team{number}"))
    return Workload("multi_agent", seed, tuple(made))


def mixed(
    mark: str, *, chats: int, chats_per_s: float, chat_words: int, chat_tokens: int, apps: int, apps_per_s: float,
    width: int, words: int, tokens: int, last: int, seed: int = 5,
) -> Workload:  # fmt: skip
    """Return documents for map and reduce, where the total counts, beside people who chat (Poisson)."""
    text = _Text(seed, mark)
    beside = map_reduce(
        mark, width=width, words=words, tokens=tokens, last=last, apps=apps, per_s=apps_per_s, seed=seed,
        objective="throughput",
    )  # fmt: skip
    talks = tuple(
        Chat(at, f"{text.mark}chat {number:03}: {text.words(chat_words)}", chat_tokens)
        for number, at in enumerate(text.times(chats, chats_per_s))
    )
    return Workload("mixed", seed, beside.apps, talks)


def loop_tools(
    mark: str, *, apps: int, most: int, words: int, tokens: int, seconds: tuple[float, float], per_s: float,
    seed: int = 6,
) -> Workload:  # fmt: skip
    """Return agents that think, use a tool of their own process on what they thought, and go on until the tool is
    content: after 1 to ``most`` times, and ``seconds`` each."""
    text = _Text(seed, mark)
    draw = random.Random(seed)
    made = []
    for number, at in enumerate(text.times(apps, per_s)):
        plan = Ask("plan", (f"{text.mark}{number:03} Plan: {text.words(words)}",), tokens)
        body = (
            Ask("think", (f"{text.mark}{number:03} You had: ", Of("notes"), f"\nThink: {text.words(words)}"), tokens),
            Tool("try", "think", round(draw.uniform(*seconds), 3)),
        )
        work = Loop("work", "notes", "plan", body, "think", "try", draw.randint(1, most))
        tell = Ask("tell", (f"{text.mark}{number:03} Tell of: ", Of("work")), tokens)
        made.append(App(f"agent{number}", at, (plan, work, tell), "tell", f"agent{number}"))
    return Workload("loop_tools", seed, tuple(made))


def warm_up(apps: int) -> Workload:
    """Return applications that have nothing to do with what is measured: a call alone and then eight at a time, in
    each. From them a gateway learns what legs cost its workers, as it has after a minute of any traffic."""
    text = _Text(0, "before")
    made = []
    for number in range(apps):
        begin = f"{text.mark}{number:03} "
        alone = Ask("alone", (f"{begin}Tell of {text.words(60)}",), 64)
        many = [
            Ask(f"with{one}", (f"{begin}{one} After ", Of("alone"), f" tell of {text.words(40)}"), 32)
            for one in range(8)
        ]
        last = Ask("last", (f"{begin}Combine ", *(Of(one.name) for one in many)), 4)
        made.append(App(f"before{number}", 0.0, (alone, *many, last), "last", f"before{number}"))
    return Workload("warm_up", 0, tuple(made))


def rendered(prompt: Sequence[Piece], values: "dict[str, str]") -> str:
    """Return the text of a prompt."""
    return "".join(piece if isinstance(piece, str) else values[piece.name] for piece in prompt)
