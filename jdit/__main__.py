"""`python -m jdit` is `jdit`."""

from jdit.cli import main

if __name__ == "__main__":
    main(prog_name="jdit")
