"""What does an index lose when its process is killed, its files are damaged, its disk is full, or
its clock jumps? Nothing, or it says so.

    python -m tests.stress            # 1,400 kills, 4,200 damaged files: a few minutes; writes
                                      # benchmarks/results/durability.json
    python -m tests.stress --quick    # half a minute, printed only

A kill loses nothing that was handed to the kernel, so this does not show what a power cut does: for
that the file relies on SQLite's `synchronous = FULL` and on the disk.
"""

import os

# Children are forked from a process that has computed already: NumPy must not have started threads.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
