"""The long proof: kill -9 at 20 random moments across all stages; `benchmarks.kill_resume` writes the table."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.soak
def test_twenty_kills_change_nothing():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "benchmarks.kill_resume", "--kills", "20", "--seed", "1"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0 and "all equal, bit for bit" in done.stdout, done.stdout + done.stderr
