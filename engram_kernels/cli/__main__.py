"""``python -m engram_kernels.cli`` is the command ``engram-kernels``."""

import sys

from . import main

sys.exit(main())
