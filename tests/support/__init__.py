"""What the tests share: states, saves, disks, processes and ranks."""
