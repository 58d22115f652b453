#!/usr/bin/env bash
# Checks a gateway of `specdec up` with @grpc/grpc-js. Arguments go to `specdec up`: --model FOLDER for one.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
cd "$root"

SPECDEC_STATE_DIR=$(mktemp -d)
export SPECDEC_STATE_DIR
trap '"$python" -m specdec down >/dev/null || true; rm -rf "$SPECDEC_STATE_DIR"' EXIT

npm --prefix "$here" ci --no-audit --no-fund --ignore-scripts >/dev/null
"$python" -m specdec up --detach "$@" >/dev/null
address=$("$python" -c 'from specdec.local.state_file import read_live_state; print(read_live_state().gateway)')
google=$("$python" -c 'import pathlib, google.rpc.status_pb2 as m; print(pathlib.Path(m.__file__).parents[2])')
node "$here/check.js" "$address" "$root/protos" "$google"
