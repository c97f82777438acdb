"""How a test changes processes that it does not start itself: a command's Spark workers, and their children."""

import os
from pathlib import Path

SITE = Path(__file__).parent


def patched(**patches: str) -> dict[str, str]:
    """Environment in which `patches` hold: patched(**{"pipeline.store": "tests.chaos.mutations:in_place"})."""
    places = [str(SITE), str(SITE.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {
        "PATCHES": " ".join(f"{module}={function}" for module, function in patches.items()),
        "PYTHONPATH": os.pathsep.join(place for place in places if place),
    }
