"""`python -m pretrain COMMAND …`."""

import sys

from pretrain.cli import command

if __name__ == "__main__":
    sys.exit(command())
