"""From a repository's files to the facts of each file, read without looking at any other file."""
