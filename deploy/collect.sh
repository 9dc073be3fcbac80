#!/bin/sh
# Collects the content of an image in a folder: the programs, the libraries that they load besides libtorch, the licences,
# and the list of all parts (written by `make sbom`).
#
#     deploy/collect.sh OUT
set -eu
cd "$(dirname "$0")/.."
out=$1
libtorch=$(pwd)/.libtorch

# The part of libtorch that the worker links to, and its own dependencies, in any folder of the wheels.
loaded() {
    ldd "$1" | awk -v under="$libtorch/" 'index($3, under) == 1 { print $3 }' | xargs -r realpath
}

mkdir -p "$out/usr/local/bin"
for program in coordinator worker; do
    strip -o "$out/usr/local/bin/$program" "target/release/$program"
done

{
    loaded target/release/worker
    # cuDNN and the compiler of CUDA are loaded by name when first needed.
    if [ -e "$libtorch/nvidia/cudnn" ]; then
        for pattern in 'libcudnn*.so*' 'libnvrtc*.so*' libcaffe2_nvrtc.so; do
            find "$libtorch/nvidia" "$libtorch/torch/lib" -name "$pattern"
        done | while read -r library; do
            echo "$library"
            loaded "$library"
        done
    fi
} | sort -u | while read -r library; do
    mkdir -p "$out$(dirname "$library")"
    strip --strip-unneeded -o "$out$library" "$library"
done

licences=$out/usr/share/doc/ganglion
mkdir -p "$licences/libtorch"
cp LICENSE dist/ganglion.cdx.json "$licences"
python3 deploy/notices.py >"$licences/THIRD-PARTY.txt"
find "$libtorch" -type f -path '*.dist-info/*' \( -iname 'LICENSE*' -o -iname 'NOTICE*' -o -iname 'License.txt' \) |
    while read -r text; do
        package=$(basename "${text%%.dist-info/*}")
        cp "$text" "$licences/libtorch/$package-$(basename "$text")"
    done
