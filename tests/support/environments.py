"""What launchers set in the environment of the processes that they start, copied from real ones.

Open MPI 5.0.11, MPICH 5.0.2, Intel MPI 2021, torchrun of torch 2.13, Slurm 22.05 with two nodes and four tasks: of 30
to 80 variables each those that say who and where the process is. Kubernetes' are those of its documentation.
"""

from __future__ import annotations

OPEN_MPI = {
    "OMPI_VERSION": "5.0.11",
    "PMIX_NAMESPACE": "prterun-vm-22446@1",
    "PMIX_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "2",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
}
MPICH = {
    "PMI_HOSTNAME": "vm",
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "PMI_RANK": "1",
    "PMI_FD": "11",
    "PMI_SIZE": "2",
}
INTEL_MPI = {
    "HYDRA_BSTRAP_LAUNCHER": "ssh",
    "PMI_SIZE": "2",
    "PMI_RANK": "1",
    "PMI_FD": "11",
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "I_MPI_HYDRA_UUID": "cc570000-9d48-ae41-5261-060088e0642f",
}
PRTERUN = {"PRTE_LAUNCHED": "1", "PMIX_NAMESPACE": "prterun-vm-22460@1", "PMIX_RANK": "1", "PMIX_HOSTNAME": "vm"}
TORCHRUN = {
    "RANK": "1",
    "GROUP_RANK": "0",
    "ROLE_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "44481",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_RUN_ID": "8b1fae09-f274-4f96-a288-65e6a38e35be",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
TORCHRUN_STATIC = TORCHRUN | {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
_ALLOCATION = {
    "SLURM_CLUSTER_NAME": "test",
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_NODELIST": "n[1-2]",
    "SLURM_TASKS_PER_NODE": "3,1",
    "SLURM_NTASKS": "4",
    "SLURM_NPROCS": "4",
}
SALLOC = _ALLOCATION | {"SLURM_JOB_NAME": "interactive"}
SBATCH = _ALLOCATION | {"SLURMD_NODENAME": "n1", "SLURM_NODEID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
# salloc where the administrator has set LaunchParameters=use_interactive_step: the shell is a step without number.
SALLOC_STEP = SBATCH | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "n1"}
# A batch script that a task of a step has submitted, and a step in it: the first one's SLURM_STEP_* are in the script.
# The first step has three tasks on n1, the second one two on n2; they may as well be alike, and on one node.
SBATCH_IN_STEP = {
    "ENVIRONMENT": "BATCH",
    "SLURMD_NODENAME": "n2",
    "SLURM_GTIDS": "0",
    "SLURM_JOB_ID": "4",
    "SLURM_JOB_NODELIST": "n2",
    "SLURM_JOB_NUM_NODES": "1",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "3",
    "SLURM_TASK_PID": "1094",
}
SRUN_IN_THAT = SBATCH_IN_STEP | {
    "SLURM_GTIDS": "0,1",
    "SLURM_LOCALID": "1",
    "SLURM_PROCID": "1",
    "SLURM_STEP_NODELIST": "n2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_TASK_PID": "1114",
    "SLURM_UMASK": "0022",
}
# What remains of the first step's `--mpi=pmi2`.
STALE_PMI = {"PMI_FD": "11", "PMI_JOBID": "1.0", "PMI_RANK": "2", "PMI_SIZE": "3"}
SRUN = _ALLOCATION | {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "3,1",
    "SLURMD_NODENAME": "n2",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "0",
    "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
}
SRUN_PMI2 = SRUN | {"SLURM_MPI_TYPE": "pmi2", "PMI_FD": "11", "PMI_JOBID": "7.0", "PMI_RANK": "3", "PMI_SIZE": "4"}
SRUN_PMIX = SRUN | {"SLURM_MPI_TYPE": "pmix", "PMIX_NAMESPACE": "slurm.pmix.7.0", "PMIX_RANK": "3"}
# MPICH's mpiexec in a batch script: its proxies are the tasks of a step, one a node; the ranks inherit its variables.
SBATCH_MPICH = MPICH | SRUN | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
SRUN_TORCHRUN = SRUN | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"} | TORCHRUN
# An indexed Job; those of a JobSet are indexed Jobs, too. How many pods there are is for its manifest to say.
INDEXED_JOB = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "HOSTNAME": "digits-2",
    "JOB_COMPLETION_INDEX": "2",
    "BNLAYER_WORLD_SIZE": "3",
}
# A worker of an MPIJob is reached by mpirun over ssh; no variable of the pod is left.
MPI_JOB = OPEN_MPI | {"PMIX_NAMESPACE": "prterun-digits-launcher-1@1"}
EXPLICIT = {"BNLAYER_RANK": "1", "BNLAYER_WORLD_SIZE": "2", "BNLAYER_JOB": "mine", "BNLAYER_ADDRESS": "h:1"}
