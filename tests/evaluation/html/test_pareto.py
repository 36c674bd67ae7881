"""The Pareto front against its definition."""

from __future__ import annotations

import itertools
import random

from torchaccel.evaluation.html.pareto import pareto_front


def test_the_front_is_what_no_other_point_beats() -> None:
    numbers = random.Random(0)
    for size in range(1, 12):
        # Few different values, so that ties are frequent.
        costs = [(float(numbers.randrange(5)), float(numbers.randrange(5))) for _ in range(size)]
        beaten = {
            i
            for (i, a), (_, b) in itertools.permutations(enumerate(costs), 2)
            if b[0] <= a[0] and b[1] <= a[1] and b != a
        }
        front = pareto_front(costs)
        assert {costs[i] for i in front} == {costs[i] for i in range(size) if i not in beaten}
        assert front == sorted(front, key=lambda i: costs[i])
