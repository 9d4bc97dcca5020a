"""`cluster/local.py` as a module: it is a script, in no package."""

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[3] / "cluster" / "local.py"
spec = importlib.util.spec_from_file_location("cluster_local", SCRIPT)
local = importlib.util.module_from_spec(spec)
spec.loader.exec_module(local)
