"""``python -m kvq_plugin`` is the ``kvq`` command, where that is not on the PATH."""

import sys

from kvq_plugin.cli import main

sys.exit(main())
