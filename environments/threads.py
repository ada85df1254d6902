"""Threads that wait for work sleep soon, instead of spinning. Scripts import this before torch, which reads it as it
loads.

GNU OpenMP's threads spin while they wait, which stalls an update where other work shares the machine (docs/SPEED.md). A
value that is set already stays.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
