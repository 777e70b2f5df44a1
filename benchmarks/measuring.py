"""The one way of measuring: the sides take turns in one process, and the median of many turns counts."""

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from time import perf_counter

Step = Callable[[], object]

WARM_UP = 4  # calls before anything is timed; a pure step needs three until its memory is recycled
SAMPLE = 5e-3  # seconds; a quicker call is repeated until a sample takes so long


@dataclass(frozen=True)
class Settings:
    """How long to measure."""

    rounds: int = 25
    least: int = 5  # so many rounds also where they take longer than the budget
    budget: float = 8.0  # seconds for the rounds of one comparison
    quick: bool = False


QUICK = Settings(rounds=7, least=3, budget=2.5, quick=True)


@dataclass
class Timing:
    """The samples of one side: seconds, or bytes."""

    samples: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@dataclass(frozen=True)
class Pair:
    """What is to be divided by what, and what the quotient should not exceed (None: for information)."""

    what: str
    ours: str
    peer: str
    bound: float | None = None


@dataclass
class Row:
    """One line of the table."""

    case: str
    what: str
    ours: str
    peer: str
    bound: float | None
    ratio: float | None = None
    low: float | None = None  # quartiles of the rounds' own ratios
    high: float | None = None
    ours_median: float | None = None
    peer_median: float | None = None
    rounds: int = 0
    unit: str = "s"
    problem: str = ""  # why there is no ratio

    @property
    def met(self) -> bool | None:
        return None if self.bound is None or self.ratio is None else self.ratio <= self.bound


def described(error: BaseException) -> str:
    """The type and the first line of an error."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".rstrip(": ")


def build(makers: dict[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """The sides that can be made, and why the others cannot: a peer that does not run is reported, not hidden."""
    sides, failures = {}, {}
    for name, make in makers.items():
        try:
            sides[name] = make()
        except Exception as error:  # noqa: BLE001 # whatever a peer raises
            failures[name] = described(error)
    return sides, failures


def alternate(
    sides: dict[str, Step], settings: Settings, *, warm_up: int = WARM_UP
) -> tuple[dict[str, Timing], dict[str, str]]:
    """The time of one call of each side, measured in turn, and why a side has none.

    Nothing but the calls is inside the timed region: the sides hold their arrays, and keep what a step returns.
    """
    timings, failures, calls = {}, {}, {}
    for name, step in sides.items():
        try:
            for _ in range(warm_up):
                step()
            calls[name] = max(1, round(SAMPLE / max(_seconds(step, 1), 1e-9))) if warm_up else 1
            timings[name] = Timing()
        except Exception as error:  # noqa: BLE001
            failures[name] = described(error)
    order = list(timings)
    # Collected between the samples instead of within them; what exists by now is not looked at again.
    gc.collect()
    gc.freeze()
    gc.disable()
    end = perf_counter() + settings.budget
    try:
        for i in range(settings.rounds):
            if i >= settings.least and perf_counter() > end:
                break
            for name in order if i % 2 == 0 else reversed(order):
                timings[name].samples.append(_seconds(sides[name], calls[name]) / calls[name])
                gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    return timings, failures


def _seconds(step: Step, calls: int) -> float:
    start = perf_counter()
    for _ in range(calls):
        step()
    return perf_counter() - start


def rows_of(case: str, pairs: list[Pair], timings: dict[str, Timing], failures: dict[str, str], unit: str = "s") -> list[Row]:
    """The line of each pair, from the samples of its two sides."""
    rows = []
    for pair in pairs:
        row = Row(case, pair.what, pair.ours, pair.peer, pair.bound, unit=unit)
        missing = [name for name in (pair.ours, pair.peer) if name not in timings]
        if missing:
            row.problem = "; ".join(f"{name}: {failures.get(name, 'not measured')}" for name in missing)
        else:
            ours, peer = timings[pair.ours], timings[pair.peer]
            row.ours_median, row.peer_median, row.rounds = ours.median, peer.median, len(ours.samples)
            row.ratio = ours.median / peer.median
            each = [a / b for a, b in zip(ours.samples, peer.samples, strict=True)]
            row.low, _, row.high = statistics.quantiles(each, method="inclusive") if len(each) > 1 else (None, None, None)
        rows.append(row)
    return rows


def compare(
    case: str, makers: dict[str, Callable[[], Step]], pairs: list[Pair], settings: Settings, *, warm_up: int = WARM_UP
) -> list[Row]:
    """Make the sides, measure them in turn, and divide."""
    sides, failures = build(makers)
    timings, more = alternate(sides, settings, warm_up=warm_up)
    return rows_of(case, pairs, timings, failures | more)
