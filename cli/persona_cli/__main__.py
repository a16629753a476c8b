"""`python -m persona_cli` is `persona`."""

from persona_cli.app import main

main()
