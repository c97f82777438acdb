"""Changes modules of the pipeline in every process that starts with this folder on its PYTHONPATH.

PATCHES="pipeline.store=tests.chaos.mutations:in_place ..." calls in_place(pipeline.store) once the module has run.
"""

import importlib
import importlib.abc
import importlib.util
import os
import sys


class _After(importlib.abc.MetaPathFinder):
    """Patches a module right after its own loader has run it."""

    def __init__(self, patches):
        self.patches = patches

    def find_spec(self, name, path, target=None):
        patch = self.patches.pop(name, None)
        if patch is None:
            return None
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            place, function = patch.split(":")
            getattr(importlib.import_module(place), function)(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("PATCHES"):
    sys.meta_path.insert(0, _After(dict(item.split("=") for item in os.environ["PATCHES"].split())))
