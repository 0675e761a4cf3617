# shellcheck shell=bash
# Sourced by every script: goes to the repository's root and says where the environment is, made or not.
#
# Sets LMD_VENV, its folder, and PYTHON, its interpreter, both absolute. The folder is the one the user named in
# LMD_VENV, else the active conda environment, else .venv. conda's base does not count: its own packages need theirs.

fail() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${LMD_VENV:-}" ]; then
  if [ -n "${CONDA_PREFIX:-}" ] && [ "${CONDA_DEFAULT_ENV:-}" != base ]; then
    LMD_VENV=$CONDA_PREFIX
  else
    LMD_VENV=$root/.venv
  fi
fi
case $LMD_VENV in
  /*) ;;
  *) LMD_VENV=$PWD/$LMD_VENV ;;
esac
export LMD_VENV
PYTHON=$LMD_VENV/bin/python
cd -- "$root"
