"""How many requests at once an endpoint bears: a window that finds the knee of its throughput.

It must not send, wait or count what is under way; it is told what ended, and says how many may run.

The knee (D.-M. Chiu and R. Jain, "Analysis of the increase and decrease algorithms for congestion avoidance", 1989) is
where more requests at once bring hardly more throughput, and only wait for each other. With N under way, throughput X
and time in the endpoint W, Little's law says N = X·W. What is looked for is the elasticity of the throughput,

    e = ln(X(N) / X(N')) / ln(N / N'):   1 while the endpoint has room for all, 0 where all more of them only wait.

The settled size S moves to S·2^(e - 1/4), measured between S and its half: it stays where the second half brings a
fifth more (2^(1/4) = 1.19). An endpoint with K places, each as fast alone as beside others, gives e = log2(2K/S), so
the size comes to rest at 2^(3/4)·K = 1.68 K, inside of [K, 2K]: all places are busy, and the next request waits at the
door. One whose time grows with N from the beginning, X = N / (a + b·N), is held where it gives 81% of all that it can
(1/b). A higher threshold would leave more of such an engine idle, 41% at 1/2; a lower one comes close to 2K.

Like TCP it starts by doubling, increases additively and decreases multiplicatively; like BBR (Cardwell et al., 2016) it
looks for its base anew, at half the size for an epoch, since prompts, neighbours and machines change. Like Netflix's
concurrency-limits it does not judge what was not full: then something else was the limit.

Where `sharers` windows are alike on one endpoint, each takes from the others when it grows. With c of them the size of
one between n/2 and n makes all of them (c - 1/2)·n and c·n; at an endpoint that is full its part of the throughput
still grows by (2c - 1)/c. So e is taken as the share of the way from log2((2c - 1)/c), which is all stolen, to 1.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

START: Final = 8
MOST: Final = 256
THRESHOLD: Final = 0.25  # see above
FOLLOWS: Final = 0.5  # while doubling: the throughput follows
RUNS_AWAY: Final = 0.75  # of a settled size, twice in a row: so far below the knee that doubling begins again
STANDS: Final = 0.15  # between a size and its half: the knee may be far below, and the half of the half is tried
LEAST_COUNT, MOST_COUNT = 16, 1024  # completions of an epoch that does not ask for more for its size
EPOCH_SIZES: Final = 1  # an epoch is at least so many completions for each that may be under way
# A throughput of n completions is known to sqrt(spread / n), by the theorem of renewals with rewards. While doubling,
# 0 and 1 are to be told apart (an error of 0.25 in e); then e is to be known to 0.12 in one look.
COUNT_DOUBLING, COUNT_SETTLED = 64, 200  # completions for a spread of 1
FULL: Final = 0.75  # the share of its size that must have been under way for an epoch to say anything
CUT: Final = 0.7  # on overload; the multiplicative decrease of CUBIC (RFC 9438)
HOLD_LEAST, HOLD_MOST = 2, 32  # epochs between two looks at the base; more of them while nothing changes
STEP_SHARE: Final = 8  # the additive increase is an eighth of the size, at small ones 1
IMPOSSIBLE: Final = 1.25  # times as much as in proportion to the size: a throughput does not grow so
FAR: Final = math.log(1.4)  # a wish so far from the smoothed one is of another world, and taken as it is
NEWEST_SHARE: Final = 1 / 3  # of a new wish in the smoothed one
MOVED: Final = math.log(1.25)  # a change of the throughput that is worth a look at the base before its time


class Phase(Enum):
    """What the present size is for."""

    DOUBLING = "doubling"
    HOLDING = "holding"
    PROBING = "probing"


@dataclass(slots=True)
class _Epoch:
    """Sums over completions, after the `skip` first: of seconds, of tokens, and of their squares and products."""

    skip: int
    need: int
    opened_at: float
    count: int = 0
    seconds: float = 0.0
    tokens: float = 0.0
    seconds_2: float = 0.0
    tokens_2: float = 0.0
    product: float = 0.0

    def spread(self) -> float:
        """The variance of (tokens ÷ their mean - seconds ÷ their mean): what makes a throughput uncertain.

        Where long answers take long, and nothing else does, it is 0, however different they are.
        """
        seconds, tokens = self.seconds / self.count, self.tokens / self.count
        if seconds <= 0 or tokens <= 0:
            return 0.0
        squares = self.seconds_2 / seconds**2 + self.tokens_2 / tokens**2 - 2 * self.product / (seconds * tokens)
        return max(0.0, squares / self.count)


@dataclass(frozen=True, slots=True)
class _Measured:
    """What a size gave: tokens in so many seconds, neither of them 0."""

    size: int
    tokens: float
    elapsed_s: float

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.elapsed_s


class Window:
    """`size` requests may be under way, at most `most`, beside those of other windows where `sharers` is more than 1.

    For one process, on the clock that is passed in.
    """

    def __init__(self, *, most: int = MOST, sharers: int = 1, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = max(1, most)
        self._stolen = math.log2((2 * sharers - 1) / sharers)
        self.size = min(START, self.most)
        self.settled = self.size
        """The size but for looks at the base."""
        self.phase = Phase.DOUBLING
        self._clock = clock
        self._before: _Measured | None = None  # of half of this size, or of this size until now; probing, of its double
        self._epochs = 0  # that `_before` is of, while holding
        self._hold = HOLD_LEAST
        self._judged_rate = 0.0
        self._ran_away = False
        self._wish: float | None = None  # the logarithm of the size that it should be, smoothed
        self.spread = 0.0
        """How uncertain the throughput of one completion is, as the square of a share."""
        self._to_forgive = 0
        self._epoch = self._new_epoch(skip=0)

    def ended(self, seconds: float, tokens: float) -> None:
        """A request was answered after `seconds`, with so many tokens: the measure of what it was worth."""
        self._to_forgive = max(0, self._to_forgive - 1)
        epoch = self._epoch
        if epoch.skip:
            epoch.skip -= 1
            epoch.opened_at = self._clock()
            return
        epoch.count += 1
        epoch.seconds += seconds
        epoch.tokens += tokens
        epoch.seconds_2 += seconds * seconds
        epoch.tokens_2 += tokens * tokens
        epoch.product += seconds * tokens
        if epoch.count >= epoch.need:
            self._close(epoch)

    def overloaded(self) -> None:
        """A request was refused for there being too many, or stalled. Those under way with it are the same event."""
        if self._to_forgive:
            self._to_forgive -= 1
            return
        before = self._to_forgive = self.size
        self._settle(self.size * CUT)
        self._hold = HOLD_LEAST
        self._epoch = self._new_epoch(skip=before)

    def _close(self, epoch: _Epoch) -> None:
        elapsed_s = self._clock() - epoch.opened_at
        before = self.size
        if elapsed_s > 0 and epoch.tokens > 0:  # a clock may stand still
            if self.phase is not Phase.HOLDING:  # there the wait, in which nothing varies, would hide it
                spread = epoch.spread()
                self.spread = max(spread, (3 * self.spread + spread) / 4)
            is_full = epoch.seconds / elapsed_s >= FULL * self.size  # by Little's law the mean number under way
            if is_full:
                self._judge(_Measured(self.size, epoch.tokens, elapsed_s))
            elif self.phase is Phase.PROBING:  # there is not even work for half of it
                self._settle(self.settled)
        self._epoch = self._new_epoch(skip=0 if before == self.size else max(before, self.size))

    def _judge(self, measured: _Measured) -> None:
        if self.phase is Phase.DOUBLING:
            self._doubled(measured)
        elif self.phase is Phase.HOLDING:
            self._held(measured)
        else:
            self._probed(measured)

    def _doubled(self, now: _Measured) -> None:
        elasticity = 1.0 if self._before is None else self._elasticity(self._before, now)
        if elasticity < FOLLOWS:
            # Where nothing is gained the knee is below the half, which was fine: the middle of what is possible.
            self._settle(self.size * 2 ** (elasticity - THRESHOLD if elasticity >= STANDS else -0.5))
        elif self.size >= self.most:
            self._settle(self.size)
        else:
            self._double(now)

    def _held(self, now: _Measured) -> None:
        held = self._before
        if held is None or _differ(held.rate, now.rate) > MOVED:  # what was before is of another world
            self._before, self._epochs = now, 1
        else:
            self._before = _Measured(now.size, held.tokens + now.tokens, held.elapsed_s + now.elapsed_s)
            self._epochs += 1
        has_moved = self._judged_rate > 0 and _differ(self._judged_rate, now.rate) > MOVED
        if self._epochs < (HOLD_LEAST if has_moved else self._hold):
            return
        if has_moved:
            self._forget()
        if self.settled == 1:
            self._double(now)
            return
        self._judged_rate = self._before.rate
        self._probe(self._before)

    def _probed(self, low: _Measured) -> None:
        high = self._before
        assert high is not None  # noqa: S101  # `_probe` sets it
        elasticity = self._elasticity(low, high)
        if high.rate / low.rate > IMPOSSIBLE * high.size / low.size:  # it has changed meanwhile
            self._forget()
            self._settle(self.settled)
            return
        if elasticity < STANDS and low.size > 1:  # the knee may be far below
            self._probe(low)
            return
        runs_away = elasticity >= RUNS_AWAY and self.settled == high.size < self.most
        if runs_away and self._ran_away:
            self._double(high)
            return
        self._ran_away = runs_away
        wish = math.log(high.size) + (elasticity - THRESHOLD) * math.log(2)
        is_far = self._wish is None or abs(wish - self._wish) > FAR
        self._wish = wish if self._wish is None or is_far else self._wish + (wish - self._wish) * NEWEST_SHARE
        self._hold = HOLD_LEAST if is_far else min(HOLD_MOST, 2 * self._hold)
        self._settle(min(math.exp(self._wish), self.settled + max(1, self.settled // STEP_SHARE)))

    def _elasticity(self, low: _Measured, high: _Measured) -> float:
        """Of the throughput between two sizes, 0 to 1: beyond these it is noise."""
        if high.size <= low.size:
            return 0.0
        measured = math.log(high.rate / low.rate) / math.log(high.size / low.size)
        return min(1.0, max(0.0, (measured - self._stolen) / (1 - self._stolen)))

    def _probe(self, high: _Measured) -> None:
        """See what half of a size gives, which gives this much."""
        self.phase = Phase.PROBING
        self._before = high
        self.size = max(1, high.size // 2)

    def _double(self, now: _Measured) -> None:
        """Double a size, which gives this much."""
        self.phase = Phase.DOUBLING
        self._before = now
        self._forget()
        self.size = self.settled = min(self.most, 2 * now.size)

    def _settle(self, size: float) -> None:
        self.phase = Phase.HOLDING
        self._before = None
        self.size = self.settled = min(self.most, max(1, round(size)))

    def _forget(self) -> None:
        self._wish = None
        self._ran_away = False
        self._hold = HOLD_LEAST

    def _new_epoch(self, *, skip: int) -> _Epoch:
        """After `skip` completions: of those that were too many, and of the first of those that are more.

        A whole number of rounds, so that requests which take equally long, and end together, are counted rightly.
        """
        counts = COUNT_DOUBLING if self.phase is Phase.DOUBLING else COUNT_SETTLED
        wished = counts * self.spread / (1 - self._stolen) ** 2
        least = max(EPOCH_SIZES * self.size, min(MOST_COUNT, max(LEAST_COUNT, wished)))
        return _Epoch(skip, need=self.size * math.ceil(least / self.size), opened_at=self._clock())


def _differ(one: float, other: float) -> float:
    return abs(math.log(one / other))
