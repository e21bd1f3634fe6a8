"""`python -m lorasurgery` is the same program as `lorasurgery`."""

from lorasurgery.cli.main import run

if __name__ == "__main__":
    run()
