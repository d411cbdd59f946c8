"""``python -m lobs_native``, the same as the command ``lobs-native``."""

import sys

from lobs_native.cli.commands import main

sys.exit(main())
