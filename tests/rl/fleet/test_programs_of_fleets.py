"""What becomes of engines and shared memory when the program that has them is killed, or stands still."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ORPHANS = """
import asyncio, sys, fleet_engines
from speaker import speaker_model, speaker_tokenizer
from glm5.rl.fleet import ProcessExecutor, SupervisedFleet

async def main():
    fleet = SupervisedFleet(ProcessExecutor(fleet_engines.threads_of_engine), 2, tokenizer=speaker_tokenizer())
    await fleet.start()
    await fleet.publish(9, speaker_model().state_dict())
    names = [publisher.name for publisher in fleet._executor._publishers.values()]
    versions = [seat.member.facts.version for seat in fleet._seats]
    print(*(seat.member.process_id for seat in fleet._seats), *versions, *names, flush=True)
    await asyncio.sleep(600)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_kill_of_the_parent_leaves_no_process_and_no_memory(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ORPHANS)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=env) as parent:
        first, second, *threads, name = parent.stdout.readline().split()
        assert threads == ["1", "1"]  # an engine computes with one thread
        assert Path(f"/dev/shm/{name}").exists() or not Path("/dev/shm").exists()
        parent.kill()
    end = time.monotonic() + 300
    while any(Path(f"/proc/{pid}").exists() for pid in (first, second)) or Path(f"/dev/shm/{name}").exists():
        assert time.monotonic() < end, "engines or their memory outlived the parent"
        time.sleep(0.05)


STOPPED = """
import asyncio, fleet_engines
from speaker import speaker_tokenizer
from glm5.rl.fleet import FleetConfig, ProcessExecutor, SupervisedFleet

async def main():
    config = FleetConfig(silence_seconds=5, stuck_seconds=5)
    fleet = SupervisedFleet(
        ProcessExecutor(fleet_engines.strict_engine), 2, tokenizer=speaker_tokenizer(), config=config
    )
    await fleet.start()
    print("ready", flush=True)
    await asyncio.to_thread(input)
    await asyncio.sleep(1.5)
    print([state.restarts for state in fleet.stats().engines], flush=True)
    await fleet.close()

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_program_that_stood_still_does_not_take_its_engines_for_dead(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(STOPPED)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, script], text=True, env=env, **pipes) as program:
        assert program.stdout.readline() == "ready\n"
        program.send_signal(signal.SIGSTOP)
        time.sleep(8)
        program.send_signal(signal.SIGCONT)
        assert program.communicate("\n")[0] == "[0, 0]\n"
