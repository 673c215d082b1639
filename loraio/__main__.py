"""Run ``python -m loraio``, the same program as the console script."""

from loraio.cli import main

if __name__ == "__main__":
    main()
