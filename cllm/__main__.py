"""`python -m cllm` is the command `cllm`."""

import sys

from cllm.cli import main

if __name__ == "__main__":
    sys.exit(main())
