"""The commit on a file system: hidden folders, locks and renames. `place` implements the seam."""
