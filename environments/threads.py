"""Makes idle threads sleep soon instead of spinning. Scripts import this before torch, which reads the setting.

GNU OpenMP's threads spin while they wait for work. Where other work shares the machine, that slows the updates down
(docs/SPEED.md). A value that is already set is kept.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
