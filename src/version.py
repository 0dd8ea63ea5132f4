"""The program's version, as recipes record it."""

VERSION = "0.1.0"
