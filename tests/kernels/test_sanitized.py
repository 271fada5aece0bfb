"""The native ops under gcc's address and undefined-behaviour sanitizers."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = "test_equals_naive or batch_of_one"
FILES = ("test_cpu_ops.py", "test_int8_plain.py")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("g++"), reason="wants gcc's sanitizers")
def test_nothing_is_read_or_computed_out_of_bounds(tmp_path: Path) -> None:
    compiler = tmp_path / "g++"
    compiler.write_text(
        '#!/bin/sh\nexec g++ "$@" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=undefined\n'
    )
    compiler.chmod(0o755)
    # libstdc++ as well: the sanitizers stand before its exceptions.
    names = [f"-print-file-name={name}.so" for name in ("libasan", "libstdc++")]
    found = [subprocess.run(["g++", name], capture_output=True, text=True, check=True).stdout.strip() for name in names]
    environment = {
        "CXX": str(compiler),
        "MOYU_CACHE": str(tmp_path),
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0:verify_asan_link_order=0",
    }
    files = [str(Path(__file__).parent / file) for file in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", "-k", TESTS, *files]
    result = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert "passed" in result.stdout
    assert list(tmp_path.glob("cpu-*.so")), "the ops were built, and not those of another cache used"
