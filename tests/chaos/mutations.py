"""Guards of the pipeline taken away one at a time, to see that the loop of kills notices."""

import contextlib
import shutil
import time

SLOW = 1.0  # seconds until a manifest that is opened has its content


def in_place(store):
    """Files are written under their final names, manifests slowly: no temporary file of theirs, no rename."""

    @contextlib.contextmanager
    def replacing(path):
        if path.name == store.MANIFEST:
            moment = path.with_name(f".{path.name}.tmp")  # by which the loop knows a publication
            moment.touch()
            path.write_bytes(b"")
            time.sleep(SLOW)
            moment.unlink(missing_ok=True)
        yield path

    store.replacing = replacing


def manifest_first(store):
    """The manifest is published before the data is whole: a stage counts as finished when it begins."""
    attempt = store.Run.attempt

    def early(self, stage, name=None):
        folder = attempt(self, stage, name)
        store.write_json(self.root / stage / store.MANIFEST, {"stage": stage, "tables": {}, "attempt": folder.name})
        return folder

    store.Run.attempt = early


def keeps_rubbish(store):
    """Folders of dead attempts stay."""
    commit = store.Run.commit

    def without_cleaning(self, *arguments):
        removed, shutil.rmtree = shutil.rmtree, lambda *a, **k: None
        try:
            return commit(self, *arguments)
        finally:
            shutil.rmtree = removed

    store.Run.commit = without_cleaning


MUTATIONS = {f.__name__: f for f in (in_place, manifest_first, keeps_rubbish)}
