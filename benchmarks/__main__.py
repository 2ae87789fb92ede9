"""``python -m benchmarks``. The workers import this file too, so it imports nothing else before it has to."""

import sys

if __name__ == "__main__":
    from benchmarks.cli import main

    sys.exit(main())
