#!/bin/bash
#SBATCH --job-name=@{name}
#SBATCH --nodes=@{nodes}
#SBATCH --ntasks-per-node=@{processes}
#SBATCH --cpus-per-task=@{cpus_per_task}
#SBATCH --mem=@{memory_gb}G
#SBATCH --time=@{time_minutes}
#SBATCH --chdir=@{workdir}
#SBATCH --output=@{folder}/slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@@@{stop_notice_s}
@{optional}
set -u
@{environment}
@{setup}

# The ranks meet at the first node of the list. Its address is the one that Slurm itself uses; the
# port follows from the job id, so that two jobs of one node do not collide.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$(scontrol --oneliner show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\) .*/\1/p')
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))

# Slurm signals this shell only (--signal=B); srun passes a signal on to all of its tasks.
interrupted=0
stop() { interrupted=1; kill -USR1 "$step" 2>/dev/null; }
trap stop USR1 TERM

# --wait: when one task has ended the others get this long; a rank that lost its peers hangs.
srun --cpus-per-task=@{cpus_per_task} --kill-on-bad-exit=0 --wait=@{wait_s} \
  bash -c @{task} dpal-task @{command} &
step=$!
wait "$step"; code=$?
while [ "$interrupted" = 1 ]; do  # a trap ends the wait early, with a code that means nothing
  interrupted=0
  wait "$step"; code=$?
done

echo "job $SLURM_JOB_ID: exit code $code after ${SLURM_RESTART_COUNT:-0} restarts"
case $code in
  75)  # stopped on request, state committed: the same job again, uncounted
    scontrol requeue "$SLURM_JOB_ID" && sleep 60 ;;
  @{final}) ;;  # done, or a matter for a person
  *)
    failures=@{folder}/failures-$SLURM_JOB_ID
    echo "$code" >> "$failures"
    if [ "$(wc -l < "$failures")" -le @{max_restarts} ]; then
      scontrol requeue "$SLURM_JOB_ID" && sleep 60
    fi ;;
esac
exit "$code"
