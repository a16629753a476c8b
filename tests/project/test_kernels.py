"""The tests that compute, with the arithmetic of other processors and another number of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]

KERNELS = {
    "the first x86-64": {
        "ATEN_CPU_CAPABILITY": "default",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "DNNL_MAX_CPU_ISA": "SSE41",
        "OMP_NUM_THREADS": "1",
    },
    "AVX2, two threads": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "DNNL_MAX_CPU_ISA": "AVX2",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",  # on however few cores there are
    },
}

COMPUTING = (
    *("method/test_arithmetic.py", "models/test_loading.py", "plan/test_joining.py"),
    *(f"engine/test_{part}.py" for part in ("kv_cache", "numerics", "reference", "run", "smollm2")),
    *("backends/test_shipping.py", "experiments", "reproduction"),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_other_kernels(name: str) -> None:
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=5"),
            *(f"{TESTS}/{part}" for part in COMPUTING),
        ],
        cwd=TESTS.parent,
        env={**own, **KERNELS[name]},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
