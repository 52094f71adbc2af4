"""Who is next: jobs that wait, shared fairly between their owners, grouped by the weights that they need.

Pure and without a clock of its own. Jobs are ordered by turns: an owner's second waiting job comes after every other
owner's first. A replica that holds a group's weights takes the first job of that group, past others; nobody is passed
more than a fixed number of times.
"""

import bisect
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(order=True)
class Entry:
    """A job that waits."""

    turn: int
    number: int
    """By arrival."""
    id: str = field(compare=False)
    group: str = field(compare=False)
    owner: str = field(compare=False)
    passed: int = field(default=0, compare=False)
    """How often a job behind it was taken first."""


class FullError(Exception):
    """There is no room for another job."""

    def __init__(self, *, of_owner: bool) -> None:
        """Take whether it is the owner's share that is full, or all of it."""
        super().__init__()
        self.of_owner = of_owner


class Backlog:
    """The jobs that wait, in the order of their turns."""

    def __init__(self, limit: int, limit_per_owner: int, overtaking: int) -> None:
        """Take the bounds.

        Args:
            limit: how many may wait.
            limit_per_owner: how many of one owner.
            overtaking: how often a job may be passed by one that is behind it.
        """
        self._limit = limit
        self._limit_per_owner = limit_per_owner
        self._overtaking = overtaking
        self._entries: list[Entry] = []
        self._arrivals = 0
        self._turn = 0  # of the job that was taken last
        self._last_turns: dict[str, int] = {}  # of each owner who has jobs here

    def __len__(self) -> int:
        """How many wait."""
        return len(self._entries)

    def add(self, job_id: str, group: str, owner: str) -> Entry:
        """Let a job wait.

        Raises:
            FullError: there is no room.
        """
        if len(self._entries) >= self._limit:
            raise FullError(of_owner=False)
        if sum(entry.owner == owner for entry in self._entries) >= self._limit_per_owner:
            raise FullError(of_owner=True)
        turn = max(self._turn, self._last_turns.get(owner, self._turn - 1) + 1)
        self._last_turns[owner] = turn
        self._arrivals += 1
        entry = Entry(turn, self._arrivals, job_id, group, owner)
        bisect.insort(self._entries, entry)
        return entry

    def put_back(self, entry: Entry) -> None:
        """Let a job that was taken wait again, at its old place and beyond all limits."""
        bisect.insort(self._entries, entry)

    def remove(self, job_id: str) -> bool:
        """Let a job go; False when it does not wait."""
        kept = [entry for entry in self._entries if entry.id != job_id]
        removed = len(kept) < len(self._entries)
        self._entries = kept
        self._forget_owners()
        return removed

    def ids(self) -> list[str]:
        """The jobs in their order."""
        return [entry.id for entry in self._entries]

    def first_group(self) -> str:
        """Which weights the first job needs; nothing when none waits."""
        return self._entries[0].group if self._entries else ""

    def take(self, held: str | None, elsewhere: Collection[str] = ()) -> Entry | None:
        """The job for a replica that has become free; None when none waits.

        Args:
            held: the group whose weights it holds.
            elsewhere: the groups that other replicas hold, which are left to those as long as there is a choice.
        """
        if not self._entries:
            return None
        reach = next((k for k, entry in enumerate(self._entries) if entry.passed >= self._overtaking), None)
        candidates = self._entries if reach is None else self._entries[: reach + 1]
        chosen = self._first_of(held, candidates) if held is not None else None
        if chosen is None:
            others = [entry for entry in candidates if entry.group not in elsewhere] or candidates
            sizes = Counter(entry.group for entry in self._entries)
            most = max(sizes[entry.group] for entry in others)
            chosen = next(entry for entry in others if sizes[entry.group] == most)
        for entry in self._entries:
            if entry is chosen:
                break
            entry.passed += 1
        self._entries.remove(chosen)
        self._turn = max(self._turn, chosen.turn)
        self._forget_owners()
        return chosen

    @staticmethod
    def _first_of(group: str, entries: list[Entry]) -> Entry | None:
        return next((entry for entry in entries if entry.group == group), None)

    def _forget_owners(self) -> None:
        """Keep no track of owners who have nothing here and no turn to come."""
        here = {entry.owner for entry in self._entries}
        self._last_turns = {o: turn for o, turn in self._last_turns.items() if o in here or turn > self._turn}
