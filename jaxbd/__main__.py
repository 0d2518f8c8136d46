"""`python -m jaxbd` is the command line."""

import sys

from jaxbd.cli.main import main

sys.exit(main())
