"""From a folder of photos to one that can be trained on: scan, examine, find, word, write. Nothing in the source changes."""
