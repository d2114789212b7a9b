"""`python -m sharpkit`: the command line."""

from sharpkit.cli import main

if __name__ == "__main__":
    main(prog_name="sharpkit")
