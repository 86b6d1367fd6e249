"""What the tests of hostile input share: strategies, and a count of what came out.

``LINEARIZE_FUZZ=20`` tries twenty times as many inputs; ``LINEARIZE_FUZZ_LOG=FILE`` writes what came out of them.
"""

import json
import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from linearize.modeling.errors import LinearizeError
from linearize.overrides import flatten
from linearize.recipe import Recipe

MORE = int(os.environ.get("LINEARIZE_FUZZ", "1"))
CAME_OUT: dict[str, Counter[str]] = defaultdict(Counter)
SPECIAL = [
    *(
        -1,
        0,
        1,
        2**31,
        2**63,
        10**12,
        10**400,
        1e308,
        float("nan"),
        float("inf"),
        "",
        "\0",
        "\ud800",
        "a\nb",
        "../x",
    ),
    *(
        "9" * 5000,
        "1e999",
        "{}",
        "[1,",
        "no",
        "0x",
        "some/kernel",
        [],
        {},
        [[]],
        [None],
        {"": None},
        {"name": []},
    ),
]
WORDS = st.one_of(
    st.text(max_size=12), st.sampled_from([*"[]{}:,&*!|>%@`'\"#?-\t\n", "<<: *a", "&a [*a]", "!!int", "1e5"])
)
VALUES = st.recursive(
    st.one_of(
        st.sampled_from(SPECIAL), st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(flatten(Recipe.resolve().to_dict())))


def examples(count):
    return settings(
        max_examples=count * MORE,
        derandomize=MORE == 1,  # the suite tries the same inputs every time; LINEARIZE_FUZZ looks for others
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


def only_ours(name, call):
    """Anything but our own errors is the test's failure."""
    try:
        call()
    except LinearizeError as error:
        CAME_OUT[name][type(error).__name__] += 1
    else:
        CAME_OUT[name]["accepted"] += 1


@pytest.fixture(scope="module", autouse=True)
def log():
    yield
    if path := os.environ.get("LINEARIZE_FUZZ_LOG"):
        Path(path).write_text(json.dumps(CAME_OUT, indent=1, sort_keys=True) + "\n")
