"""`python -m cdm_toolkit.cli`, for when the `cdm` script is not on the path."""

from cdm_toolkit.cli import entry

entry()
