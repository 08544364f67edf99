"""What a user runs: build, search, eval, info, verify, and the command line."""
