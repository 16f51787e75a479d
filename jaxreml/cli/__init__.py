"""The command line."""

from jaxreml.cli.commands import app as app
