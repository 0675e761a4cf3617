#!/usr/bin/env bash
# Makes a ready environment from the pinned requirements, on a machine with Python >= 3.10.
#
#   bash create_environment.sh              what main.py, recon.py and detect.py need
#   bash create_environment.sh --learned    and the weights of the distance STLPIPS (66 MB)
#   bash create_environment.sh --test       and what the tests need
#
# It goes into the active conda environment other than base, else into .venv here; LMD_VENV=FOLDER names another folder.
# Run again, it returns at once where all is there and completes what an interrupted run left.
# LMD_DISK_GB says how much disk space it must find. For Linux, torch brings CUDA's libraries: 5.8 GB installed, 2.1 GB
# while pip unpacks them, and as much again in pip's cache, so 10 GB; a build of torch without CUDA needs 2.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/environment.sh"

case "$#:${1:-}" in
  0:) files=(requirements.txt) ;;
  1:--learned) files=(requirements.txt requirements-learned.txt) ;;
  1:--test) files=(requirements.txt requirements-learned.txt requirements-test.txt) ;;
  1:--help | 1:-h)
    sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p;}' create_environment.sh
    exit 0
    ;;
  *) fail "unknown arguments '$*'; the only options are --learned and --test" ;;
esac

main() {
  if complete; then
    echo "environment ready: $PYTHON"
    return
  fi
  # One run at a time: the others wait, then find all done. Where there is no flock, the user takes care.
  exec 9<requirements.txt
  if command -v flock >/dev/null; then flock 9 || true; fi
  if ! complete; then
    trap discard_temporary EXIT
    discard_temporary
    check_disk
    make_interpreter
    discard_half_installed
    install_packages
    write_stamps
  fi
  echo "environment ready: $PYTHON"
}

# Whether the stamp of the last requirement file asked for tells of this very interpreter and these very files.
complete() {
  local stamp=$LMD_VENV/${files[${#files[@]} - 1]}.stamp
  [ -s "$stamp" ] && [ "$(cat "$stamp")" = "$(fingerprint "${files[@]}")" ]
}

# The interpreter's version and the SHA-256 of each file.
fingerprint() {
  "$PYTHON" -I -c '
import hashlib, pathlib, sys
print(*sys.version_info[:2], *(hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest() for path in sys.argv[1:]))
' "$@" 2>/dev/null
}

# pip unpacks beside the environment, as /tmp is often a small disk in memory. A killed run leaves it all there.
discard_temporary() {
  rm -rf -- "$LMD_VENV/lmd-tmp"
}

check_disk() {
  local needed=${LMD_DISK_GB:-10} parent=$LMD_VENV there free
  while [ ! -d "$parent" ]; do parent=$(dirname -- "$parent"); done
  there=$(du -sk "$LMD_VENV" 2>/dev/null | awk '{ print $1 }') || true
  free=$(df -Pk "$parent" | awk 'NR == 2 { print $4 }') || true
  awk "BEGIN { exit !(${free:-1e12} + ${there:-0} >= $needed * 2^20) }" ||
    fail "too little disk space for $LMD_VENV: $((free / 1048576)) GB free, $needed GB needed; free some, name a" \
      "folder on another disk in LMD_VENV, or say in LMD_DISK_GB that less will do"
}

# An interpreter in the folder, made where none runs: in a new folder, after an interrupted run, when the Python that
# it came from is gone.
make_interpreter() {
  if ! recent "$PYTHON"; then
    [ ! -d "$LMD_VENV/conda-meta" ] ||
      fail "the conda environment $LMD_VENV has no Python >= 3.10; run: conda install 'python>=3.10'"
    if "$PYTHON" -c '' 2>/dev/null; then
      fail "$PYTHON is older than Python 3.10; remove $LMD_VENV, or name another folder in LMD_VENV"
    fi
    [ -e "$LMD_VENV/pyvenv.cfg" ] || [ -z "$(find "$LMD_VENV" -type f 2>/dev/null | head -n 1)" ] ||
      fail "$LMD_VENV holds files and is no Python environment; name another folder in LMD_VENV"
    local base
    base=$(find_python)
    "$base" -m venv --clear "$LMD_VENV" || fail "$base could not make $LMD_VENV (its message is above)"
    echo '*' >"$LMD_VENV/.gitignore" # for a folder inside the repository
  fi
}

recent() {
  "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

find_python() {
  local candidate incomplete=""
  for candidate in python3.13 python3.12 python3.11 python3.10 python3; do
    recent "$candidate" || continue
    if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
      echo "$candidate"
      return
    fi
    incomplete=${incomplete:-$candidate}
  done
  [ -z "$incomplete" ] ||
    fail "$incomplete has no venv module; on Debian or Ubuntu run: sudo apt install" \
      "$("$incomplete" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"
  fail "no Python >= 3.10 found (tried python3.13 to python3.10, python3); install one, or activate a conda environment"
}

# pip takes a package for installed once its metadata are there, and writes INSTALLER after the last of its files.
discard_half_installed() {
  local info
  for info in "$LMD_VENV"/lib/python3*/site-packages/*.dist-info; do
    [ -e "$info/INSTALLER" ] || grep -qsF "${info##*/}/" "$LMD_VENV"/conda-meta/*.json || rm -rf -- "$info"
  done
}

install_packages() {
  local remedy="check the network connection, then run again: bash create_environment.sh"
  "$PYTHON" -c 'from importlib.metadata import version; version("pip")' 2>/dev/null || "$PYTHON" -m ensurepip ||
    fail "$PYTHON could not get pip (its message is above); install pip there, then run again"
  mkdir -p "$LMD_VENV/lmd-tmp"
  TMPDIR=$LMD_VENV/lmd-tmp "$PYTHON" -m pip install --disable-pip-version-check "${files[@]/#/--requirement=}" ||
    fail "pip could not install the packages (its message is above); $remedy"
}

# The stamps stand for finished work, so they come last, and whole.
write_stamps() {
  local count
  for count in $(seq ${#files[@]}); do
    fingerprint "${files[@]:0:count}" >"$LMD_VENV/lmd-stamp.tmp"
    mv -- "$LMD_VENV/lmd-stamp.tmp" "$LMD_VENV/${files[count - 1]}.stamp"
  done
}

main
