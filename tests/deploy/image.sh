#!/usr/bin/env bash
# Build the images without a registry, and train inside them:   make image-test
#
# Needs root that may mount (CAP_SYS_ADMIN), and of Debian's packages buildah, mmdebstrap and openssh-client. Two minutes: a
# small Debian and all dependencies are downloaded. BASE_TAR names a file in which the Debian is kept for the next time.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

fail() {
  echo "image test: $*" >&2
  exit 1
}

# Processes and mounts are in namespaces of their own: when this ends, however it does, none are left, and the folder in
# which they were can be removed.
if [[ -z ${IMAGE_TEST_FOLDER:-} ]]; then
  [[ $(id -u) -eq 0 ]] || fail "expected root, which makes the images' users and mounts; received user $(id -un)"
  for tool in buildah mmdebstrap ssh-keygen; do
    command -v "$tool" >/dev/null || fail "$tool is missing: bash .ci/system-tools installs it in CI, or names its package"
  done
  unshare --mount --pid --fork --mount-proc true ||
    fail "expected root that may mount; received one without CAP_SYS_ADMIN: start the container with it"
  IMAGE_TEST_FOLDER=$(mktemp -d)
  export IMAGE_TEST_FOLDER
  # What has just been killed may still be ending.
  trap 'for _ in {1..50}; do rm -rf "$IMAGE_TEST_FOLDER" 2>/dev/null && break; sleep 0.2; done' EXIT
  unshare --mount --pid --fork --kill-child --mount-proc bash "${BASH_SOURCE[0]}" &
  inside=$!
  trap 'kill -KILL "$inside"; exit 143' TERM INT   # buildah goes on after a SIGTERM
  wait "$inside"
  exit
fi

work=$IMAGE_TEST_FOLDER
base=${BASE_TAR:-$work/base.tar}
export BUILDAH_ISOLATION=chroot
driver=()
buildah() { command buildah --root "$work/root" --runroot "$work/runroot" "${driver[@]}" "$@"; }
buildah info >/dev/null 2>&1 || driver=(--storage-driver vfs)   # copies in place of layers, where the latter can't be
step() { printf '=== %s s: %s\n' "$SECONDS" "$*"; }

step "a base"
# Under the name of the Dockerfile's base, which has another Python: 3.11 to 3.13 will do. Its settings of apt and dpkg are
# those of Debian's own images.
[[ -s $base ]] || mmdebstrap --quiet --variant=apt --include=libpython3-dev,python3-venv,ca-certificates,passwd \
  --dpkgopt=force-unsafe-io --aptopt='Acquire::Languages "none"' bookworm "$base"
container=$(buildah from scratch)
buildah add --quiet "$container" "$base" /
buildah commit --quiet --rm "$container" docker.io/library/python:3.13-slim-bookworm

# The machine's settings of pip, and its certificates, hold inside as well; those in variables as a file.
printf '[global]\n' >"$work/pip.conf"
for name in index_url extra_index_url trusted_host cert default_timeout; do
  variable=PIP_${name^^}
  [[ -z ${!variable:-} ]] || printf '%s = %s\n' "${name//_/-}" "${!variable}" >>"$work/pip.conf"
done
shared=(--volume "$work/pip.conf:/root/.config/pip/pip.conf:ro")
for path in /etc/pip.conf /etc/xdg/pip /etc/ssl/certs; do
  [[ ! -e $path ]] || shared+=(--volume "$path:$path:ro")
done
# Unoptimized, in a fifth of the time: what the kernels compute is the same.
compiler=$(uname -m)-linux-gnu-g++
printf '#!/bin/sh\nexec /usr/bin/%s "$@" -O0\n' "$compiler" >"$work/compiler"
chmod 755 "$work/compiler"
shared+=(--volume "$work/compiler:/usr/local/bin/$compiler:ro")
build=(build --pull-never --format docker --network host "${shared[@]}")
step "deploy/docker/Dockerfile"
buildah "${build[@]}" --file deploy/docker/Dockerfile --tag bnlayer .
step "deploy/docker/Dockerfile.mpijob"
buildah "${build[@]}" --file deploy/docker/Dockerfile.mpijob --tag bnlayer-mpijob deploy/docker

.venv/bin/python -c 'import sys; sys.path.insert(0, "tests"); from pathlib import Path
from support.datasets import write; write(Path(sys.argv[1]), [200])' "$work/data"
train=(bnlayer train --data=/data --epochs=3 --hidden=8)

step "two workers over the service"
container=$(buildah from --pull-never localhost/bnlayer)
buildah run --user 10001:10001 --volume "$work/data:/data:ro" "$container" -- \
  sh -ec "python -c 'import bnlayer.kernels._native' && ${train[*]} --workers=2 --save=/tmp/run.safetensors"

step "MPIJob: the worker's sshd without rights, the launcher's ssh, and mpiexec"
mkdir "$work/ssh"
ssh-keygen -q -t ecdsa -N '' -f "$work/ssh/id_rsa"
cp "$work/ssh/id_rsa.pub" "$work/ssh/authorized_keys"
chmod 644 "$work"/ssh/*   # as the operator mounts them
chmod 755 "$work"
container=$(buildah from --pull-never localhost/bnlayer-mpijob)
# shellcheck disable=SC2016  # the variables are those of the shell inside
buildah run --user 1000:1000 --volume "$work/data:/data:ro" --volume "$work/ssh:/home/mpiuser/.ssh:ro" "$container" -- sh -ec '
  /usr/sbin/sshd -De -f /etc/ssh/sshd_bnlayer.conf 2>/tmp/sshd.log &
  sshd=$!
  trap "kill $sshd" EXIT
  ssh -o ConnectionAttempts=20 localhost "id -un" | grep mpiuser
  '"mpiexec -n 2 ${train[*]} --transport=mpi --save=/tmp/run.safetensors"

step "passed"
