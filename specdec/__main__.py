"""`python -m specdec`."""

from specdec.cli.main import main

main()
