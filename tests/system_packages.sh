#!/usr/bin/env bash
# Programs that some tests start for real: Slurm, Prometheus, Chromium. In CI they are installed;
# elsewhere their absence is only told, and those tests are skipped with a reason.
set -euo pipefail

declare -A package_of=(
  [slurmctld]=slurm-wlm
  [munged]=munge
  [prometheus]=prometheus
  [chromium]=chromium
)
missing=()
for program in "${!package_of[@]}"; do
  PATH="$PATH:/usr/sbin" command -v "$program" >/dev/null || missing+=("${package_of[$program]}")
done
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "${CI:-}" = true ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "── installing for the tests: ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
else
  echo "── not installed, so their tests are skipped: ${missing[*]}"
fi
