"""``python -m lightning_ssesam``."""

from lightning_ssesam.cli import main

if __name__ == "__main__":
    main()
