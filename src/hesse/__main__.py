"""`python -m hesse` is `hesse`."""

from hesse.cli import main

if __name__ == "__main__":
    main()
