"""The program's version, as recipes record it."""

VERSION = "0.3.0"
