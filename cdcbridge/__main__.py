"""Run the command line by `python -m cdcbridge`."""

from cdcbridge.cli import main

main()
