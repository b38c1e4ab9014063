"""`python -m normbt_kernels` is the command `normbt`."""

import sys

from normbt_kernels.commands.cli import main

sys.exit(main())
