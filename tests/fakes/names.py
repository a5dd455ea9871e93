"""Names whose addresses a test decides."""

import ipaddress
from collections.abc import Sequence

LOOPBACK = ipaddress.ip_address("127.0.0.1")


class Names:
    """A resolver that gives each name its next answer, the last one for ever."""

    def __init__(self, **answers: list[list[str]]) -> None:
        self.asked: list[str] = []
        self._answers = answers

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self._answers.get(host.partition(".")[0])
        if answers is None:
            return [str(ipaddress.ip_address(host))]  # raises ValueError for a name that nobody knows
        return answers.pop(0) if len(answers) > 1 else answers[0]
