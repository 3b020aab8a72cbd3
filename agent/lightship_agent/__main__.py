"""`python -m lightship_agent` is `lightship-agent`."""

import sys

from lightship_agent.cli import main

if __name__ == "__main__":
    sys.exit(main())
