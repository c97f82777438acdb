"""Takes one guard of the pipeline away in every process that starts with CHAOS_MUTATION set."""

import importlib.abc
import importlib.util
import os
import sys


class _After(importlib.abc.MetaPathFinder):
    """Patches pipeline.store right after its own loader has run it."""

    def find_spec(self, name, path, target=None):
        if name != "pipeline.store":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            from tests.chaos.mutations import MUTATIONS

            MUTATIONS[os.environ["CHAOS_MUTATION"]](module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("CHAOS_MUTATION"):
    sys.meta_path.insert(0, _After())
