def disturbed(entry): return ""
