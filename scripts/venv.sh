# shellcheck shell=bash
# Sourced by the other scripts: finds a Python that is new enough and keeps .venv up to date with setup.cfg.
# make_venv EXTRAS   e.g. "" or "[dev]"; afterwards $venv is its directory.

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${SLURMFORK_VENV:-$here/.venv}

say() { printf '%s\n' "$*" >&2; }

find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    say "slurmfork needs Python 3.10 or later; none was found (PYTHON=/path/to/python3 names one)"
    return 1
}

make_venv() {
    local python stamp
    python=$(find_python) || return 1
    stamp=$("$python" -V; cat "$here/setup.cfg" "$here/pyproject.toml"; echo "$1")
    if [ -x "$venv/bin/python" ] && [ "$(cat "$venv/.stamp" 2>/dev/null)" = "$stamp" ]; then
        return
    fi
    say "installing into $venv ..."
    "$python" -m venv "$venv" || {
        say "cannot make a virtual environment; on Debian and Ubuntu: apt-get install python3-venv"
        return 1
    }
    "$venv/bin/python" -m pip --disable-pip-version-check -q install -e "$here$1" || {
        say "the installation failed; pip's own words are above"
        return 1
    }
    printf '%s' "$stamp" >"$venv/.stamp"
}
