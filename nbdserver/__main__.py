"""``python -m nbdserver``: the command line."""

from nbdserver.cli import main

if __name__ == "__main__":
    main(prog_name="nbdserver")
