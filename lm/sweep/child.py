"""A program that ends when the process that started it ends, even by SIGKILL: it gets SIGTERM, and saves its state.

python -m lm.sweep.child MODULE FLAGS...
"""

import ctypes
import os
import runpy
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h. Other systems have no such call: there a trial of a killed sweep runs to its end

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() == 1:
            sys.exit("the process that started this has ended")
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
