"""What is there, is it whole, what to do: list, verify, diagnose. Torch-free."""
