"""`python -m d2f`: the command line where the script `d2f` is not on the path."""

from d2f.cli.main import main

if __name__ == "__main__":
    main()
