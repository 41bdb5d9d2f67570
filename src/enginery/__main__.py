"""`python -m enginery` is `enginery`."""

from enginery.cli.main import main

if __name__ == "__main__":
    main()
