"""`python -m cdm_toolkit.cli`, where the script is not on the path."""

from cdm_toolkit.cli import entry

entry()
