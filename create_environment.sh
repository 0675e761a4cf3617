#!/usr/bin/env bash
# Makes a ready environment from the pinned requirements, on a machine with Python >= 3.10 and 10 GB of free disk.
#
#   bash create_environment.sh              what main.py, recon.py and detect.py need
#   bash create_environment.sh --learned    and the weights of the distance STLPIPS (66 MB)
#   bash create_environment.sh --test       and what the tests need
#
# It goes into the active conda environment other than base, else into .venv here; LMD_VENV=FOLDER names another folder.
# Run again, it returns at once where all is there. A .venv that an interrupted run left is made anew.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/scripts/environment.sh"

case "$*" in
  "") files=(requirements.txt) ;;
  --learned) files=(requirements.txt requirements-learned.txt) ;;
  --test) files=(requirements.txt requirements-learned.txt requirements-test.txt) ;;
  *) fail "unknown arguments '$*'; the only options are --learned and --test" ;;
esac
installed=$LMD_VENV/lmd/installed   # a copy of the requirement files, one after the other as above
unfinished=$LMD_VENV/lmd/unfinished # there while pip works, which unpacks in it, as /tmp is often a small disk in memory

works() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; }

# Whether what was installed last was all of today's files, or these and more.
complete() {
  [[ ! -e $unfinished && $(cat "$installed" 2>/dev/null)$'\n' == "$(cat "${files[@]}")"$'\n'* ]] && works "$PYTHON"
}

exec 9<requirements.txt
complete || flock 9 # until another run has finished
if ! complete; then
  if ! works "$PYTHON" || [[ -e $LMD_VENV/pyvenv.cfg && -e $unfinished ]]; then
    [[ -e $LMD_VENV/pyvenv.cfg || -z $(ls -A "$LMD_VENV" 2>/dev/null) ]] ||
      fail "$LMD_VENV has no Python >= 3.10; install one there (conda install 'python>=3.10'), or name another folder in LMD_VENV"
    for python in python3 python3.13 python3.12 python3.11 python3.10 none; do works "$python" && break; done
    [ "$python" != none ] || fail "no Python >= 3.10 found; install one, or activate a conda environment"
    "$python" -m venv --clear "$LMD_VENV" || fail "$python could not make $LMD_VENV (its message is above)"
  fi
  mkdir -p -- "$unfinished"
  TMPDIR=$unfinished "$PYTHON" -m pip install --disable-pip-version-check "${files[@]/#/--requirement=}" || {
    rm -r -- "$LMD_VENV/lmd"
    fail "pip could not install the packages (its message is above); then run again: bash create_environment.sh"
  }
  cat -- "${files[@]}" >"$installed"
  rm -r -- "$unfinished"
fi
echo "environment ready: $PYTHON"
