# Sourced by the other scripts: makes the project's virtual environment in .venv or reuses it.
# The caller has set ROOT to the checkout.

VENV="$ROOT/.venv"

# Prints the first Python of at least 3.11 that can make virtual environments; 3.11 is preferred.
find_python() {
    local candidate
    for candidate in python3.11 python3 python3.12 python3.13 python3.14; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "medvit needs Python 3.11 or newer with the venv module, and found none; install it (Debian, Ubuntu:" \
        "apt-get install python3.11-venv) and run this again" >&2
    return 1
}

# ensure_venv EXTRA: .venv with the package, editable, and one extra of pyproject.toml. Installs again only after
# pyproject.toml has changed, the checkout was moved, or the last installation did not finish.
ensure_venv() {
    local extra="$1" stamp="$VENV/.installed-$1" wanted python
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        python="$(find_python)" || return 1
        echo "making $VENV with $("$python" --version)"
        "$python" -m venv "$VENV" || return 1
    fi
    wanted="$ROOT"$'\n'"$(<"$ROOT/pyproject.toml")"
    if [[ ! -f "$stamp" || "$(<"$stamp")" != "$wanted" ]]; then
        echo "installing medvit[$extra] into $VENV; the first time this downloads PyTorch and takes minutes"
        "$VENV/bin/python" -m pip install --disable-pip-version-check --editable "$ROOT[$extra]" || return 1
        printf '%s\n' "$wanted" >"$stamp"
    fi
}
