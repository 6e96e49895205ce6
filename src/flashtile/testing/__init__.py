"""How flashtile is tested, for those who test on top of it: budgets, cases, guards, memory."""

from flashtile.testing.budget import assert_within_budget
from flashtile.testing.cases import CASES, Case, Problem
from flashtile.testing.guards import Fenced, fence, poisoned_allocations
from flashtile.testing.run import Results, assert_matches_reference, run, run_reference

__all__ = [
    "CASES",
    "Case",
    "Fenced",
    "Problem",
    "Results",
    "assert_matches_reference",
    "assert_within_budget",
    "fence",
    "poisoned_allocations",
    "run",
    "run_reference",
]
