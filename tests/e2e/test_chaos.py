"""A loop of kills at random moments.  `make chaos` makes a hundred, and takes guards away to see the loop notice."""

import os
import random

import pytest

from tests.chaos.__main__ import loop


@pytest.mark.slow
@pytest.mark.skipif("TAGMILL_CHAOS" not in os.environ, reason="random by design: TAGMILL_CHAOS=1, or make chaos")
def test_ten_kills_change_nothing(tmp_path):
    seed = random.SystemRandom().randrange(2**31)
    history = []
    assert loop(tmp_path, 10, seed, "local[2]", tell=history.append) == [], "\n".join([f"seed {seed}", *history])
