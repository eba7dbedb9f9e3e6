"""Runs scripts in forked children, for tests that stop them: only the first start costs seconds.

Students of test-time training are tiny here, and shards of features hold four images.

A line of JSON on stdin is a call: ``script``, ``argv``, and files for ``stdout`` and ``stderr``
(``"gone"``: a pipe that nobody reads). Answers are two lines: the child's id at once, its exit
status (minus the signal that killed it) at its end.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


class Zygote:
    """The tests' end of it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def start(self, script: str, argv: Sequence, stdout="/dev/null", stderr="/dev/null") -> int:
        """Begin a run; returns its process id."""
        call = {"script": script, "argv": list(map(str, argv))}
        call |= {"stdout": str(stdout), "stderr": str(stderr)}
        self.process.stdin.write(json.dumps(call) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def status(self) -> int:
        """Wait for the run's end."""
        return int(self.process.stdout.readline())

    def run(self, script: str, argv: Sequence, **files) -> int:
        """A whole run."""
        self.start(script, argv, **files)
        return self.status()

    def stop(
        self, when: Callable[[], bool], kind: signal.Signals, script: str, argv: Sequence, **files
    ) -> int:
        """A run that gets a signal as soon as ``when()`` is true."""
        process = self.start(script, argv, **files)
        deadline = time.monotonic() + 120
        while not when() and time.monotonic() < deadline:
            time.sleep(0.005)
        os.kill(process, kind)
        return self.status()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def redirect(target: str, descriptor: int) -> None:
    if target == "gone":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(writer, descriptor)


def serve() -> None:
    import clip  # noqa: F401  (what else scripts would import is cheap)
    import timm  # noqa: F401
    import torch
    from conftest import TINY, load_script

    import apm.data.features
    from apm import APMConfig

    def tiny_student(feature_dim: int = 768, pooling: str = "attention") -> APMConfig:
        return APMConfig(**TINY | {"feature_dim": feature_dim, "pooling": pooling})

    APMConfig.tta = tiny_student
    apm.data.features.SHARD_IMAGES = 4
    torch.set_num_threads(1)
    ended: list[int] = []
    for line in sys.stdin:
        while ended:  # until now the id was the child's own, so that a late kill hit nobody else
            os.waitpid(ended.pop(), 0)
        call = json.loads(line)
        child = os.fork()
        if child == 0:
            redirect("/dev/null", 0)
            redirect(call["stdout"], 1)
            redirect(call["stderr"], 2)
            sys.argv = [call["script"]]
            code = load_script(call["script"]).main(call["argv"])
            os._exit(code)
        print(child, flush=True)
        end = os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        print(end.si_status if end.si_code == os.CLD_EXITED else -end.si_status, flush=True)
        ended.append(child)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    serve()
