"""What stands on each kind of page: of a file, of a folder, of the whole repository."""
