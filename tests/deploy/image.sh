#!/usr/bin/env bash
# Build the images without a registry, and train inside them:   make image-test
#
# Needs root, and of Debian's packages buildah, mmdebstrap and openssh-client. By hand, not in CI: it downloads a Debian
# and all dependencies, which takes more than the three minutes that a test may. BASE_TAR names a base that is kept.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

work=$(mktemp -d)
base=${BASE_TAR:-$work/base.tar}
export BUILDAH_ISOLATION=chroot STORAGE_DRIVER=vfs
buildah() { command buildah --root "$work/root" --runroot "$work/runroot" "$@"; }
trap 'buildah rm --all >/dev/null || true; rm -rf "$work"' EXIT

# Under the name of the Dockerfile's base, which has another Python: 3.11 to 3.13 will do.
[[ -s $base ]] || mmdebstrap --quiet --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$base"
container=$(buildah from scratch)
buildah add --quiet "$container" "$base" /
buildah commit --quiet --rm "$container" docker.io/library/python:3.13-slim-bookworm

# The machine's settings of pip, and its certificates, hold inside as well.
shared=()
for path in /etc/pip.conf /etc/xdg/pip /etc/ssl/certs; do
  [[ ! -e $path ]] || shared+=(--volume "$path:$path:ro")
done
build=(build --quiet --pull-never --format docker --network host "${shared[@]}")
buildah "${build[@]}" --file deploy/docker/Dockerfile --tag bnlayer .
buildah "${build[@]}" --file deploy/docker/Dockerfile.mpijob --tag bnlayer-mpijob deploy/docker

.venv/bin/python -c 'import sys; sys.path.insert(0, "tests"); from pathlib import Path
from support.datasets import write; write(Path(sys.argv[1]), [200])' "$work/data"
train=(env BNLAYER_KERNELS=reference bnlayer train --data=/data --epochs=3 --hidden=8)

echo "=== two workers over the service"
container=$(buildah from --pull-never localhost/bnlayer)
buildah run --user 10001:10001 --volume "$work/data:/data:ro" "$container" -- \
  "${train[@]}" --workers=2 --save=/tmp/run.safetensors

echo "=== MPIJob: the worker's sshd without rights, the launcher's ssh, and mpiexec"
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

echo "=== passed"
