#!/usr/bin/env bash
# A run on Slurm, with a Ray cluster of its own: sbatch deploy/slurm.sh CONFIG [key=value …]
#   sbatch --nodes=3 deploy/slurm.sh sd35_flowbp_lagrange name=sd35 output=/shared/runs backbone.path=/shared/models/sd35
# Submit it in a checkout that all nodes see, with its environment in .venv (or FLOWBP_RAY_VENV=… or an active one).
#   stop:       scancel --batch --signal=TERM JOB      finishes the step, saves, ends
#   time limit: five minutes before it the same, and the job is queued again; resume=auto goes on
#SBATCH --job-name=flowbp_ray
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=flowbp_ray-%j.log
set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch deploy/slurm.sh CONFIG [key=value …]" >&2
    exit 2
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "deploy/slurm.sh: not in a Slurm job; submit it: sbatch deploy/slurm.sh $*" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-.}"
venv=${FLOWBP_RAY_VENV:-.venv}
if [[ -f $venv/bin/activate ]]; then
    # shellcheck disable=SC1091
    source "$venv/bin/activate"
fi

# A token for this cluster alone, in a folder that only its owner reads and that every node sees.
umask 077
state=$PWD/.flowbp_ray-$SLURM_JOB_ID
mkdir -p "$state"
od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$state/token"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$state/token
unset RAY_ADDRESS

steps=()
# shellcheck disable=SC2317,SC2329 # the trap calls it
finish() {
    for step in "${steps[@]}"; do
        kill -TERM "$step" 2>/dev/null || true # `ray start --block` ends what it started
    done
    wait || true
    rm -rf "$state"
}
trap finish EXIT

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
cpus=${SLURM_CPUS_PER_TASK:-1}
first=(--nodes=1 --ntasks=1 "--cpus-per-task=$cpus" "--nodelist=${nodes[0]}")
# Not --ip-address: Debian's /etc/hosts says 127.0.1.1 of a node's own name, which no other node reaches.
read -r -a addresses < <(srun "${first[@]}" hostname --all-ip-addresses) || true
address=
for one in "${addresses[@]}"; do
    if [[ $one == *.*.*.* && $one != 127.* ]]; then
        address=$one
        break
    fi
done
if [[ -z $address ]]; then
    echo "deploy/slurm.sh: ${nodes[0]} has no IPv4 address that other nodes reach: ${addresses[*]}" >&2
    exit 1
fi
port=$((20000 + SLURM_JOB_ID % 10000)) # above Ray's worker ports, below those that the kernel gives away
# SLURM_GPUS_ON_NODE is the first node's; further options of every `ray start` may be given in FLOWBP_RAY_START.
read -r -a more <<<"${FLOWBP_RAY_START:-}"
common=(--block --disable-usage-stats "--num-cpus=$cpus" "--num-gpus=${SLURM_GPUS_ON_NODE:-0}" "${more[@]}")

srun "${first[@]}" ray start --head "--node-ip-address=$address" "--port=$port" --include-dashboard=false \
    "--temp-dir=/tmp/ray-$SLURM_JOB_ID" "${common[@]}" &
steps+=($!)
for ((tries = 0; ; tries++)); do
    if ray health-check "--address=$address:$port" >/dev/null 2>&1; then
        break
    elif ((tries == 60)) || ! kill -0 "${steps[0]}" 2>/dev/null; then
        echo "deploy/slurm.sh: no Ray on ${nodes[0]} ($address:$port); what it said is above" >&2
        exit 1
    fi
    sleep 2
done
if ((${#nodes[@]} > 1)); then
    others=$(IFS=,; echo "${nodes[*]:1}")
    srun "--nodes=$((${#nodes[@]} - 1))" "--ntasks=$((${#nodes[@]} - 1))" --ntasks-per-node=1 "--cpus-per-task=$cpus" \
        "--nodelist=$others" ray start "--address=$address:$port" "${common[@]}" &
    steps+=($!)
fi

# The driver is this script's child: SIGTERM finishes the step and saves. What is given on the command line comes last.
RAY_ADDRESS=$address:$port python -m flowbp_ray train "$1" resume=auto cluster.placement_timeout=600 "${@:2}" &
driver=$!
again=no
trap 'kill -TERM "$driver" 2>/dev/null || true' TERM INT
trap 'again=yes; kill -TERM "$driver" 2>/dev/null || true' USR1
while true; do # a trapped signal ends `wait`, not the driver
    code=0
    wait "$driver" || code=$?
    kill -0 "$driver" 2>/dev/null || break
done
if [[ $again == yes && $code == 130 ]]; then # 130: stopped on request, after saving
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
