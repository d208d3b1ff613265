"""python -m virtmount."""

import sys

from virtmount.cli import main

sys.exit(main())
