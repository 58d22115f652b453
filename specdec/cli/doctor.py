"""`specdec doctor`."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click
from rich.text import Text

from specdec.cli.render import console
from specdec.cli.streams import report, show_json
from specdec.doctor.checks import Finding, Level, diagnose
from specdec.doctor.facts import read_facts

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "bold red"}
_INDENT = 10
"""Columns before what a finding says."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of lines.")
def doctor(as_json: bool) -> None:
    """Say what is wrong with this machine as a place for the services, and what to do about it.

    Run it where something is slow or does not start. It looks at the cores and what else
    keeps them busy, at the processor, torch, the kernels in C, the GPU, memory, shared
    memory, the versions of libraries, the limit of open files, and, where `specdec up` runs,
    at the health of its services. It changes nothing and takes some seconds.

    A warning costs speed; a problem keeps something from working. The exit code is 1 if there
    is a problem, else 0.

    \b
    Examples:
      specdec doctor
      specdec doctor --json
    """
    if not as_json:
        report("Looking at this machine; it takes some seconds.")
    findings = diagnose(read_facts())
    num_problems = sum(finding.level is Level.PROBLEM for finding in findings)
    if as_json:
        show_json({"num_problems": num_problems, "findings": [asdict(finding) for finding in findings]})
    else:
        _print(findings)
    if num_problems:
        sys.exit(1)


def _print(findings: list[Finding]) -> None:
    out = console()
    for finding in findings:
        mark = Text(f"{finding.level:<{_INDENT}}", style=_STYLES[finding.level])
        out.print(mark + Text(f"{finding.name}: {finding.says}"), soft_wrap=True)
        if finding.do:
            out.print(" " * _INDENT + f"Do this: {finding.do}", soft_wrap=True, markup=False)
