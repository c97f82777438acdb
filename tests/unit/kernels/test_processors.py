"""The kernels as numba makes them for other processors give the same answer."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[3]

PROGRAM = """
import sys
import numpy as np
import scipy.sparse as sp
from numba import njit
from pipeline.kernels import lockstep, simd
from pipeline.kernels.simd import LANES

@njit
def fused(x, z, out, x64, z64, out64):
    simd.store(out, 0, simd.fma(simd.load(x, 0), simd.load(x, 0), simd.load(z, 0)))
    X = simd.splat64(x64)
    simd.store(out64, 0, simd.fma(X, X, simd.splat64(z64)))

# what is left of x * x - z is the rounding of the product: a multiplication and an addition lose it
x, out, out64 = np.full(LANES, 1 + 2**-12, np.float32), np.empty(LANES, np.float32), np.empty(LANES)
fused(x, -(x * x), out, 1 + 2.0**-30, -((1 + 2.0**-30) ** 2), out64)
assert (out == 2.0**-24).all(), out
assert (out64 == 2.0**-60).all(), out64

rng = np.random.default_rng(0)
X = sp.random(400, 80, 0.1, "csr", np.float32, rng)
squares = np.asarray(X.multiply(X).sum(axis=1)).ravel() + 1
rows = lockstep.Rows(X.indptr.astype(np.int64), X.indices.astype(np.int32), X.data, squares.astype(np.float32), 80)
Y = np.sign(X @ rng.normal(size=(80, LANES)) - 0.1).astype(np.int8)
Y[Y == 0] = -1
C = np.geomspace(0.1, 100, LANES).astype(np.float32)
found = [
    lockstep.solve(rows, lockstep.Lanes(Y.ravel(), C, C, loss), 1e-7, 2000, 0)
    for loss in (lockstep.LOGISTIC, lockstep.SQUARED_HINGE)
]
np.savez(sys.argv[1], *(s.W for s in found), *(s.primal for s in found))
assembly = "".join(lockstep.sweep.inspect_asm().values())
print("zmm" in assembly, "ymm" in assembly, "vfmadd" in assembly)
"""

AVX2 = "+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe,+popcnt,+sse3,+ssse3,+sse4.1,+sse4.2,+cx16,+64bit"
PROCESSORS = {
    "no avx": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    "avx2": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": AVX2},
}


def answer(home, **env):
    """Weights and objectives, and which instructions the sweep is made of: zmm, ymm, vfmadd."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(home / "found.npz")],
        # a cache of its own: what is looked at is what was compiled just now
        env={**os.environ, **env, "NUMBA_CACHE_DIR": str(home), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [array for _, array in sorted(np.load(home / "found.npz").items())], done.stdout.split()


@pytest.fixture(scope="module")
def native(tmp_path_factory):
    return answer(tmp_path_factory.mktemp("native"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(PROCESSORS))
def test_other_processors_give_the_same_answer(tmp_path, name, native):
    other, (zmm, ymm, fused) = answer(tmp_path, **PROCESSORS[name])
    assert zmm == "False"
    assert (ymm, fused) == (("False", "False") if name == "no avx" else ("True", "True"))
    assert len(native) == len(other) == 4
    for mine, theirs in zip(native, other, strict=True):
        assert np.abs(mine).max() > 0
        np.testing.assert_allclose(theirs, mine, rtol=1e-4, atol=1e-4 * np.abs(mine).max())
