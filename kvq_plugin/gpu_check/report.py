"""The run's steps, its clock and its verdict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rich.console import Console
from rich.markup import escape


@dataclass
class Clock:
    """Seconds of the whole run; a step may end early, and must say so, when its share is over."""

    limit: float
    now: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.now()

    def left(self) -> float:
        return self.limit - (self.now() - self.start)

    def within(self, items: Iterable, share: float) -> Iterable:
        """*items*, until *share* seconds from now, or all of them, are over."""
        end = self.now() + min(share, self.left())
        for item in items:
            if self.now() >= end:
                return
            yield item


@dataclass
class Outcome:
    """What one step found. ``skipped`` says why it did not run, or not to its end."""

    passed: int = 0
    failures: list[str] = field(default_factory=list)
    skipped: str = ""

    def check(self, what: str, good: bool, detail: str = "") -> None:
        if good:
            self.passed += 1
        else:
            self.failures.append(f"{what}: {detail}" if detail else what)

    @property
    def word(self) -> str:
        if self.failures:
            return "FAILED"
        if self.skipped:
            return "partly" if self.passed else "skipped"
        return "ok"


@dataclass
class Report:
    """All steps; ``run`` prints each as it ends and never lets one hide the others."""

    console: Console
    clock: Clock
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(self, name: str, step: Callable[[], Outcome]) -> Outcome:
        """Run *step*; what it raises counts as a failure. Returns its outcome."""
        begin = self.clock.now()
        try:
            outcome = step()
        except Exception as e:  # the other steps still have something to say
            outcome = Outcome(failures=[f"{type(e).__name__}: {e}"])
        self.outcomes[name] = outcome
        seconds = self.clock.now() - begin
        line = f"{name:<24} {outcome.word:<8} {outcome.passed} checks, {seconds:.0f} s"
        self.console.print(escape(line), highlight=False)
        if outcome.skipped:
            self.console.print(escape(f"    not run: {outcome.skipped}"), highlight=False)
        for failure in outcome.failures[:8]:
            self.console.print(escape(f"    {failure}"), highlight=False)
        if len(outcome.failures) > 8:
            self.console.print(f"    and {len(outcome.failures) - 8} more")
        return outcome

    @property
    def good(self) -> bool:
        return not any(o.failures for o in self.outcomes.values())
