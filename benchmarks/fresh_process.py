"""Peak memory and bytes read of a program in a fresh process; Linux only.

Peak is ru_maxrss, reads are ``rchar`` of /proc/self/io. PyTorch, which is no dependency, is hidden:
where it is installed, transformers imports it.
"""

import os
import subprocess
import sys

# The peak of a process includes that of the one it was started from: start it from a small one.
_FRESH_PARENT = ("sh", "-c", '"$0" "$@"; exit $?')

_PRELUDE = """
import resource, sys
sys.modules["torch"] = None
from ifp_mlx.blas import prefer_openblas
prefer_openblas()
def read_bytes():
    return int(open("/proc/self/io").read().split()[1])
def report(before):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"{peak} {read_bytes() - before}", file=sys.stderr)
"""
"""What a program can call: ``read_bytes()``, and at its end ``report(what it had read before)``."""


def measure(program: str, *arguments: str) -> tuple[int, int]:
    """Return peak resident bytes and bytes read of a program in a fresh process."""
    environment = {**os.environ, "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*_FRESH_PARENT, sys.executable, "-c", _PRELUDE + program, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"a measured process failed:\n{done.stderr}")
    peak_bytes, read_bytes = done.stderr.strip().splitlines()[-1].split()
    return int(peak_bytes), int(read_bytes)
