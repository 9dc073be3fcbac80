#!/bin/sh
# Makes stand-ins for the images that deploy/Dockerfile builds from, where no registry of images is reached: Debian from its
# packages, and Rust from this machine's own. Prints the arguments that `podman build` then takes.
#
#     make image IMAGE_ARGS="$(tests/deploy/bases.sh)"
set -eu
base=localhost/ganglion-test/debian:bookworm-slim
rust=localhost/ganglion-test/rust:bookworm
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

if ! podman image exists "$base"; then
    # shellcheck disable=SC2016 # apt-get puts in the site, not the shell.
    mirror=$(apt-get indextargets --format '$(SITE)' 'Created-By: Packages' | grep -m1 '/debian/\?$')
    debootstrap --variant=minbase --include=ca-certificates bookworm "$folder/debian" "$mirror" >&2
    # As bookworm-slim does.
    for part in var/cache/apt var/lib/apt/lists var/log usr/share/doc usr/share/man usr/share/locale; do
        find "$folder/debian/$part" -mindepth 1 -delete
    done
    tar -C "$folder/debian" --exclude='./dev/*' -c . | podman import - "$base" >&2
fi
if ! podman image exists "$rust"; then
    mkdir -p "$folder/rust/usr/local/rustup"
    cp -a "$(rustc --print sysroot)/." "$folder/rust/usr/local/rustup"
    rm -rf "$folder/rust/usr/local/rustup/share/doc"
    cat >"$folder/rust/Dockerfile" <<END
FROM $base
COPY usr /usr
ENV PATH=/usr/local/rustup/bin:/usr/local/cargo/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
ENV CARGO_HOME=/usr/local/cargo
END
    podman build --quiet --tag "$rust" "$folder/rust" >&2
fi
# Registries of packages may be reached through a proxy that only this machine's certificates know.
certificates=/etc/ssl/certs/ca-certificates.crt
echo "--build-arg RUST_IMAGE=$rust --build-arg BASE_IMAGE=$base --volume $certificates:$certificates:ro"
