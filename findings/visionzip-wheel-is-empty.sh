#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Package:   visionzip 0.1.3 from PyPI, the newest there (VisionZip, arXiv 2412.04467, its authors' package)
# Date:      2026-11-27, Python 3.11
# Source:    the wheel's own list of files (RECORD, top_level.txt)
# Behaviour: `pip install visionzip` succeeds, but the wheel holds no Python file: nothing can be imported.
# Expected:  the method that its description tells to `from visionzip import visionzip`.
# Means:     comparisons against "the visionzip package" compare against nothing; only the repository has the code.
# Seen:
#   installed visionzip 0.1.3, 5 files, 0 of them Python
#   import visionzip: ModuleNotFoundError
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv" || exit 2
"$folder/venv/bin/pip" install --quiet --no-deps visionzip==0.1.3 || exit 2
"$folder/venv/bin/python" - <<'PY'
import sys
from importlib.metadata import distribution, version

files = distribution("visionzip").files or []
mine = [f for f in files if f.name not in ("INSTALLER", "REQUESTED")]
code = [f for f in mine if f.suffix == ".py"]
print(f"installed visionzip {version('visionzip')}, {len(mine)} files, {len(code)} of them Python")
try:
    import visionzip  # noqa: F401
except ModuleNotFoundError:
    print("import visionzip: ModuleNotFoundError")
else:
    sys.exit("it can be imported now")
sys.exit(bool(code))
PY
