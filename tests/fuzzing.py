"""Damaged files for property tests: bounded, and the same in every run.

``APM_FUZZ=20 pytest tests/test_fuzz.py`` tries 20 times as many.
"""

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

SCALE = int(os.environ.get("APM_FUZZ", 1))


def examples(count: int):
    """Settings: ``count`` inputs, the same ones every time."""
    return settings(
        max_examples=count * SCALE,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damaged(draw, contents):
    """One of the ``contents`` with some bytes changed, cut out, doubled or put in."""
    data = bytearray(draw(st.sampled_from(contents)))
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, len(data)))
        length = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(("change", "cut", "double", "insert", "end", "number")))
        if kind == "change":
            data[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
        elif kind == "cut":
            del data[place : place + length]
        elif kind == "double":
            data[place:place] = data[place : place + length]
        elif kind == "insert":
            data[place:place] = draw(st.binary(max_size=64))
        elif kind == "end":
            del data[place:]
        else:  # a length or an offset, as in headers
            value = draw(st.sampled_from((0, 1, 2**31 - 1, 2**32 - 1, 2**63 - 1)))
            data[place : place + 8] = value.to_bytes(8, "little")
    return bytes(data)
