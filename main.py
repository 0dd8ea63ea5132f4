"""python main.py "prompt" ... : hands the command line to src.cli and returns its exit code."""

import sys

from src.cli import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
