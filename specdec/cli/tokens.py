"""The command that makes bearer tokens."""

from __future__ import annotations

import hashlib
import json
import secrets

import click

from specdec.cli.streams import report, show


def _not_blank(_context: click.Context, _parameter: click.Parameter, value: str) -> str:
    if not value.strip():
        raise click.BadParameter("give the caller a name: limits count by it.")
    return value


def make_token(name: str) -> tuple[str, str]:
    """Return a new bearer token and its entry for a file of tokens, which says its caller's name."""
    secret = secrets.token_urlsafe(32)
    digest = hashlib.sha256(secret.encode()).hexdigest()
    return secret, f'[[tokens]]\nname = {json.dumps(name)}\nsha256 = "{digest}"'


@click.command()
@click.argument("name", callback=_not_blank)
def token(name: str) -> None:
    """Make a bearer token for NAME, a caller of a gateway that runs with --auth-tokens FILE.

    Standard output gets the entry for FILE, which holds only a checksum of the token. Standard error gets
    the token itself, for the caller to set as SPECDEC_TOKEN; it is shown only now.

    \b
    Example:
      specdec token alice >> tokens.toml
    """
    secret, entry = make_token(name)
    show(entry)
    show("# max_concurrent_requests = 4\n# max_new_tokens = 1024\n# requests_per_minute = 60")
    show("# expires = 2030-01-31T00:00:00Z\n")
    report(f"The token of {name}, for SPECDEC_TOKEN: {secret}")
