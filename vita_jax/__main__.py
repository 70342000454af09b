"""`python -m vita_jax` is `vita`."""

import sys

from vita_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
