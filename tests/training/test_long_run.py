"""What a long run holds: no more at its end than after its first pictures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_two_thousand_steps_hold_what_two_hundred_do(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
    command = [sys.executable, Path(__file__).with_name("two_thousand_steps.py"), tmp_path]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    _, second, *later = json.loads(done.stdout)  # at steps 100, 300, 500, …, 1,900
    assert [found["step"] for found in later] == list(range(500, 2000, 200))
    for name in ("arrays", "bytes", "compilations"):
        assert {found[name] for found in later} == {second[name]}, name
    for name in ("files", "threads"):
        assert max(found[name] for found in later) <= second[name] + 4, name
    # An allocator never gives all back: 1,600 steps, 8 checkpoints and 8 pictures may leave a little.
    assert max(found["rss"] for found in later) < 1.1 * second["rss"]
