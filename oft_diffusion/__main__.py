"""`python -m oft_diffusion` is the console script."""

import sys

from oft_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
