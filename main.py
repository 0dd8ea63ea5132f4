"""python main.py "prompt" ... : hands the command line to src.cli and returns its exit code."""

import sys

if __name__ == "__main__":
    try:
        from src.cli import main  # here, because Ctrl+C may come while it is being imported

        code = main(sys.argv[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
