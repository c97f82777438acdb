"""A loop of kills at random moments.  `make chaos` makes a hundred, and takes guards away to see the loop notice."""

import random

import pytest

from tests.chaos.__main__ import Local, loop


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_change_nothing(tmp_path):
    seed = random.SystemRandom().randrange(2**31)
    history = []
    found = loop(tmp_path, 10, seed, Local(), tell=history.append)
    assert found["wrong"] == [], "\n".join([f"seed {seed}", *history])
    assert found["kills"] == 10
