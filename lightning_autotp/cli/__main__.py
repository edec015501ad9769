"""``python -m lightning_autotp.cli`` is the console script."""

from lightning_autotp.cli.main import main

if __name__ == "__main__":
    main()
