"""The program's version, as recipes record it."""

VERSION = "0.4.0.dev0"
