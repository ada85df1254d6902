"""Ray's settings. Ray reads them when it is imported, and TorchRL imports Ray. So import this before both."""

import os
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# If this token exists, a cluster that `ray start` made asks for it. Ray does not send it by itself (Ray 2.60).
TOKEN = (Path.home() / ".ray" / "auth_token").exists()
if "RAY_ADDRESS" in os.environ and TOKEN:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
