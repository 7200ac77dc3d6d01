"""`python -m egemma_server` is `egemma-server`."""

import sys

from egemma_server.cli import main

sys.exit(main())
