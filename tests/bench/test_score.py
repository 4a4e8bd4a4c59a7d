"""bench/score.py: the CPU time of processes that have ended still counts."""

import os
import subprocess
import sys

from bench.score import Clock

BUSY = "import time\nwhile time.process_time() < 0.5: pass\nprint(flush=True)\ninput()"


def test_the_time_of_an_ended_process_is_kept():
    clock = Clock(os.getpid())
    clock.add(1)
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        clock.add(1)
        process.communicate(b"\n")
    clock.add(1)
    before, during, after = (cpu for _, cpu, _ in clock.seen)
    assert before + 0.45 < during <= after
