"""Run a command; print its seconds and peak resident MiB as JSON, and its exit status.

A process of its own because a child's peak starts at what its parent had at the fork.
"""

import json
import os
import subprocess
import sys
import time

start = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
taken = time.perf_counter() - start
print(json.dumps({"s": taken, "MiB": usage.ru_maxrss / 1024, "status": status}))
