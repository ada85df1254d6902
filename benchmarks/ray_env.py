"""Ray's settings. Ray reads them as it is imported, and TorchRL imports Ray: so this comes before both."""

import os
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# A cluster that `ray start` made asks for this token where it exists, and ray.init() does not show it by itself (2.60).
TOKEN = (Path.home() / ".ray" / "auth_token").exists()
if "RAY_ADDRESS" in os.environ and TOKEN:
    os.environ.setdefault("RAY_AUTH_MODE", "token")
