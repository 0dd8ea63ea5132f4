"""The program's version, as recipes record it."""

VERSION = "0.2.0"
