"""`python -m jaxmerge` is the command `jaxmerge`."""

from jaxmerge.cli import main

if __name__ == "__main__":
    main()
