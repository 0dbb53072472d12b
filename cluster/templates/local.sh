#!/bin/sh
# @{name}: run by `python -m cluster.local`, which starts it again after exit code 75.
@{environment}
@{setup}
cd @{workdir} || exit 4
exec @{command}
