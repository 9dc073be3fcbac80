#!/usr/bin/env bash
# Makes what a release consists of, in dist/: a wheel, an image, a bill of materials of each, the notes, and
# SHA256SUMS over all of them. `make release` runs it.
#
#   CUDA=1             adds the wheel and the image for GPUs
#   DRAFT=1            for a trial: uncommitted changes, an unfinished changelog and unchecked advisories are allowed
#   DOCKER, IMAGE_ARGS as of `make image`
set -euo pipefail
cd "$(dirname "$0")/.."

version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
docker=${DOCKER:?the name of podman or docker}
kinds=(cpu ${CUDA:+cuda})

refuse() {
  echo "no release: $1" >&2
  [ -n "${DRAFT:-}" ] || exit 2
}

# The section of the changelog, without its heading.
notes() {
  awk -v version="$version" '/^## /{ inside = index($2, version) == 1 } inside && !/^## /' CHANGELOG.md
}

[ -z "$(git status --porcelain)" ] || refuse "there are uncommitted changes: commit them"
grep -q "^## $version, 2" CHANGELOG.md || refuse "CHANGELOG.md has no section '## $version, YYYY-MM-DD'"
make pins
make advisories REQUIRE_ADVISORIES=1 || refuse "known faults of the crates were not checked, or there are some"

rm -rf dist
for kind in "${kinds[@]}"; do
  cuda=$([ "$kind" = cuda ] && echo 1 || true)
  make wheel CLOUD=1 CUDA="$cuda"
  mv dist/wheel.cdx.json "dist/ganglion-$version-$kind-wheel.cdx.json"
  make image DOCKER="$docker" CUDA="$cuda" ${IMAGE_ARGS:+IMAGE_ARGS="$IMAGE_ARGS"}
  container=$("$docker" create "ganglion:$kind")
  "$docker" cp "$container:/usr/share/doc/ganglion/ganglion.cdx.json" "dist/ganglion-$version-$kind-image.cdx.json"
  "$docker" rm "$container" >/dev/null
  "$docker" tag "ganglion:$kind" "ganglion:$version-$kind"
  # Podman and Docker both load this format.
  "$docker" save "ganglion:$version-$kind" | gzip --no-name >"dist/ganglion-$version-$kind-image.tar.gz"
done
notes >dist/NOTES.md

cd dist
sha256sum -- * >../SHA256SUMS.new
mv ../SHA256SUMS.new SHA256SUMS
sha256sum --check --quiet SHA256SUMS
ls -l
