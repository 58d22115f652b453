"""Write prometheus-rule.yaml from deploy/prometheus/rules.yaml: kustomize puts no document into another."""

from __future__ import annotations

from pathlib import Path

HERE = Path(__file__).parent
RULES = HERE.parents[2] / "prometheus" / "rules.yaml"
TARGET = HERE / "prometheus-rule.yaml"

HEAD = """\
# Made by `make prometheus-rule` from deploy/prometheus/rules.yaml; change it there.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: specdec
spec:
"""


def render() -> str:
    """Return the manifest: the rules as they are, two columns further in, without the comments at the top."""
    text = RULES.read_text()
    body = text[text.index("groups:") :]
    return HEAD + "".join(f"  {line}" if line.strip() else line for line in body.splitlines(keepends=True))


if __name__ == "__main__":
    TARGET.write_text(render())
