"""`python -m ebdiff` is `ebdiff`."""

from .cli import main

if __name__ == "__main__":
    main()
