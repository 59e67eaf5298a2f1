r"""Word problem task: short stories about a number of things, solved one operation at a time.

A problem reads ``Mia has 12 shells, finds 7 more, then loses 5. How many shells does Mia have now?`` Its solution
computes one event after the other: ``12+7=19. 19-5=14. \boxed{14}``.
"""

import random
import re
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, NamedTuple

from egspo_lightning.data.tasks.family import ProblemFamily
from egspo_lightning.errors import require
from egspo_lightning.types import Demonstration, Problem

NAMES = ("Ann", "Ben", "Eva", "Ivan", "Lena", "Mia", "Omar", "Tom")
ITEMS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
EVENTS = {
    "+": ("buys {} more", "finds {} more", "gets {} more"),
    "-": ("gives {} away", "loses {}", "sells {}"),
    "*": ("soon has {} times as many",),
}
"""Wordings of an event, by its operation."""

_STORY = re.compile(r"(\w+) has ([0-9]{1,4}) (\w+), (.+)\. How many \w+ does \w+ have now\?")
_PATTERNS = {
    re.compile(wording.replace("{}", "([0-9]{1,4})")): (operator, wording)
    for operator, wordings in EVENTS.items()
    for wording in wordings
}


class Event(NamedTuple):
    """A change of the number of things."""

    operator: str
    wording: str
    number: int

    def apply(self, count: int) -> int:
        """The number of things after the event."""
        return {"+": count + self.number, "-": count - self.number, "*": count * self.number}[self.operator]


class Story(NamedTuple):
    """A problem, read from its text."""

    name: str
    item: str
    start: int
    events: tuple[Event, ...]

    @property
    def counts(self) -> list[int]:
        """Number of things at the start and after each event."""
        return list(accumulate(self.events, lambda count, event: event.apply(count), initial=self.start))

    def __str__(self) -> str:
        """The text of the problem."""
        *others, last = (event.wording.format(event.number) for event in self.events)
        events = ", ".join([*others, f"then {last}" if others else last])
        return f"{self.name} has {self.start} {self.item}, {events}. How many {self.item} does {self.name} have now?"


@dataclass(frozen=True)
class WordProblemTask(ProblemFamily):
    """Stories of several events that each add to, take from or multiply the number of things.

    Problems with the same calculation are in the same split, whatever the words.

    Args:
        num_events: Events in a story, which is the number of steps of its solution; 1 to 8.
        max_number: Largest number that is added or subtracted, at least 2; factors are 2 to 5.
        max_value: Largest number of things at any time, at least max_number; the smallest is 1.

    Raises:
        UserError: a value is out of range.
    """

    name: ClassVar[str] = "word_problems"

    num_events: int = 3
    max_number: int = 20
    max_value: int = 100

    def __post_init__(self) -> None:
        require(1 <= self.num_events <= 8, "num_events", self.num_events, "from 1 to 8")
        require(self.max_number >= 2, "max_number", self.max_number, "at least 2")
        allowed = f"at least max_number ({self.max_number})"
        require(self.max_value >= self.max_number, "max_value", self.max_value, allowed)

    def draw(self, rng: random.Random) -> str:
        """Draw a story; numbers of things may leave the allowed range."""
        name, item, start = rng.choice(NAMES), rng.choice(ITEMS), rng.randint(2, self.max_number)
        return str(Story(name, item, start, tuple(self._event(rng) for _ in range(self.num_events))))

    def key(self, text: str) -> str | None:
        """The calculation, such as ``12+7-5``; see ``ProblemFamily.key``."""
        story = _parse(text)
        if story is None or str(story) != text or not self._fits(story):
            return None
        return f"{story.start}" + "".join(f"{event.operator}{event.number}" for event in story.events)

    def answer(self, text: str) -> str:
        """The number of things after the last event."""
        return str(_known(text).counts[-1])

    def solve(self, problem: Problem, seed: int | str = 0) -> Demonstration:
        r"""The only worked solution: one calculation for each event, and the last result in ``\boxed{}``."""
        story = _known(problem.problem)
        counts = story.counts
        steps = (
            f"{before}{event.operator}{event.number}={after}. "
            for before, event, after in zip(counts, story.events, counts[1:], strict=False)
        )
        return Demonstration(problem.id, problem.problem, "".join(steps) + f"\\boxed{{{counts[-1]}}}")

    def _event(self, rng: random.Random) -> Event:
        operator = rng.choice(list(EVENTS))
        return Event(operator, rng.choice(EVENTS[operator]), rng.randint(2, self._largest(operator)))

    def _fits(self, story: Story) -> bool:
        numbers_fit = all(2 <= event.number <= self._largest(event.operator) for event in story.events)
        counts_fit = all(1 <= count <= self.max_value for count in story.counts)
        starts = 2 <= story.start <= self.max_number and story.name in NAMES and story.item in ITEMS
        return starts and len(story.events) == self.num_events and numbers_fit and counts_fit

    def _largest(self, operator: str) -> int:
        return 5 if operator == "*" else self.max_number


def _known(text: str) -> Story:
    story = _parse(text)
    assert story is not None, "not a problem of the family"
    return story


def _parse(text: str) -> Story | None:
    """Read a story; for any text outside of the family, the result is None or has another text."""
    match = _STORY.fullmatch(text)
    if match is None:
        return None
    name, start, item, told = match.groups()
    parts = told.replace("then ", "").split(", ")
    matches = ((pattern.fullmatch(part), kind) for part in parts for pattern, kind in _PATTERNS.items())
    return Story(name, item, int(start), tuple(Event(*kind, int(match[1])) for match, kind in matches if match))
