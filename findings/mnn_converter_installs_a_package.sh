#!/usr/bin/env bash
# MNN 3.6.1: the command mnnconvert runs "pip install -U aliyun-log-python-sdk" when it is started, for a log of its own use.
#
# One expects a converter to install nothing: no dependency of that name is declared, nothing asks, and the pip that is found
# first on the path may belong to another Python. Here os.system only notes the commands, so nothing is installed. The
# compiled part can be called without that module: python -c "import sys, _tools; _tools.mnnconvert(sys.argv)" OPTIONS.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q mnn==3.6.1
"$folder/venv/bin/python" - <<'PYTHON'
import os
from importlib.metadata import requires, version

print("MNN", version("mnn"), "declares", requires("mnn"))
commands = []
os.system = lambda command: commands.append(command) or 0

import MNN.tools.mnnconvert  # what the command mnnconvert imports first

print("commands that were run:", commands)
assert any("pip install" in command and "aliyun-log" in command for command in commands), "changed since this was written"
PYTHON
