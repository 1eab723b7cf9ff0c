"""`python -m convert SRC DST` is `jdit convert SRC DST`."""

import sys

from jdit.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]], prog_name="jdit")
