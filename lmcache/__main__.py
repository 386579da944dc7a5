"""`python -m lmcache`: the command line."""

from lmcache.cli import main

if __name__ == "__main__":
    main()
