"""`python -m lightship` is `lightship`."""

from lightship.cli import main

if __name__ == "__main__":
    main()
