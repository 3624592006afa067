"""`python -m tinygrad_llm COMMAND` is `tinygrad-llm COMMAND`."""

import sys

from tinygrad_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
