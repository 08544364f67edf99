"""The commands of the command line, by subject, and what they print. pipelines/cli.py registers them."""
