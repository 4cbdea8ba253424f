"""``python -m anyattention_conformance`` is the command `anyattention`."""

import sys

from anyattention_conformance.cli import main

if __name__ == "__main__":
    sys.exit(main())
