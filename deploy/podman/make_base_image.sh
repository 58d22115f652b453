#!/usr/bin/env bash
# A stand-in for the image python:3.11-slim-bookworm where no registry can be reached: Debian bookworm with its own Python 3.11.
# Needs root, debootstrap and podman.
set -euo pipefail

root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase \
    --include=ca-certificates,python-is-python3,python3,python3-pip,python3-venv,gcc,libc6-dev bookworm "$root" >&2
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*
tar -C "$root" -c . | podman import - localhost/python:3.11-slim-bookworm
