"""How the ranks of one job find each other: their start id, and where their saves and loads meet."""
