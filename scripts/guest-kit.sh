#!/usr/bin/env bash
# Fetches the guest kit from Debian's archive into build/guest-kit (or $SLUICE_GUEST_KIT); nothing is installed, and root is not needed.
#   linux-uml, modules-uml/  User-Mode Linux of Debian unstable with its FUSE, virtio-fs and vsock drivers: Debian 12's own (6.1) dies on CPUs with AMX
#   vmlinuz, modules-qemu/   Debian 12's 6.12 cloud kernel for QEMU, with virtio-fs built in, and its vsock drivers
#   vhost-device-vsock       the vsock device of both: its other end are Unix sockets
#   busybox                  the guests' user land
#   lib/                     the libc that programs of unstable need
# With --peers also virtiofsd (Rust) and virtiofsd-c (QEMU's), to compare with.
set -euo pipefail
cd "$(dirname "$0")/.."
kit=$(realpath -m "${SLUICE_GUEST_KIT:-build/guest-kit}")
peers=no
[ "${1:-}" != --peers ] || peers=yes
fail() { echo "guest-kit: $*" >&2; exit 1; }
. scripts/debian.sh

# A kit is whole when it holds the stamp of this script; the path is in it because programs of unstable know their loader by its path.
stamp="$(sha256sum <scripts/guest-kit.sh) $kit"
if [ "$(cat "$kit/stamp" 2>/dev/null)" = "$stamp" ] && { [ $peers = no ] || [ -e "$kit/virtiofsd" ]; }; then exit 0; fi

mkdir -p "$(dirname "$kit")"
tmp=$(mktemp -d "$kit.XXXXXX")
trap 'rm -rf "$tmp"' EXIT
echo "guest-kit: fetching guest kernels from Debian's archive"

mkdir -p "$tmp/root" "$tmp/new/lib" "$tmp/new/modules-uml" "$tmp/new/modules-qemu"
open_archive "$tmp/apt" bookworm bookworm-security sid
kernel=$(apt-cache "${archive_options[@]}" depends linux-image-6.12-cloud-amd64 2>/dev/null | sed -n 's/.*Depends: \(linux-image-.*\)/\1/p' | head -n 1)
[ -n "$kernel" ] || fail "Debian 12 has no linux-image-6.12-cloud-amd64"
unpack "$tmp/root/bookworm-security" bookworm-security "$kernel"
unpack "$tmp/root/bookworm" bookworm busybox-static
unpack "$tmp/root/sid" sid user-mode-linux vhost-device-vsock libc6 libgcc-s1
new=$tmp/new sid=$tmp/root/sid/usr
cp "$tmp"/root/bookworm-security/boot/vmlinuz-* "$new/vmlinuz"
cp "$tmp/root/bookworm/bin/busybox" "$new/busybox"
cp "$sid/bin/linux.uml" "$new/linux-uml"
cp "$sid/bin/vhost-device-vsock" "$new/vhost-device-vsock"
vsock=(vsock vmw_vsock_virtio_transport_common vmw_vsock_virtio_transport)
for module in fuse virtiofs overlay "${vsock[@]}"; do
  find "$sid/lib/uml/modules" -name "$module.ko" -exec cp {} "$new/modules-uml/" \;
done
for module in "${vsock[@]}"; do
  find "$tmp/root/bookworm-security/lib/modules" -name "$module.ko.xz" -exec "$new/busybox" unxz -c {} \; >"$new/modules-qemu/$module.ko"
done
foreign=(linux-uml vhost-device-vsock)
if [ $peers = yes ]; then
  unpack "$tmp/root/sid" sid virtiofsd libseccomp2 libcap-ng0
  cp "$sid/libexec/virtiofsd" "$new/virtiofsd"
  # What the C server links is what QEMU itself links.
  unpack "$tmp/root/bookworm" bookworm qemu-system-common
  cp "$tmp/root/bookworm/usr/lib/qemu/virtiofsd" "$new/virtiofsd-c"
  foreign+=(virtiofsd)
fi
cp -P "$sid"/lib/x86_64-linux-gnu/lib*.so* "$sid/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2" "$new/lib/"
for program in "${foreign[@]}"; do
  patchelf --set-interpreter "$kit/lib/ld-linux-x86-64.so.2" --set-rpath "$kit/lib" "$new/$program"
done

[ "$(dd if="$new/vmlinuz" bs=1 skip=514 count=4 status=none)" = HdrS ] || fail "$kernel holds no bootable kernel"
for module in fuse virtiofs overlay "${vsock[@]}"; do [ -s "$new/modules-uml/$module.ko" ] || fail "user-mode-linux has no $module.ko"; done
for module in "${vsock[@]}"; do [ -s "$new/modules-qemu/$module.ko" ] || fail "$kernel has no $module.ko"; done
"$new/busybox" true || fail "busybox does not run"
rm -rf "$kit"
mv "$new" "$kit"
for program in "${foreign[@]}"; do "$kit/$program" --version >/dev/null || fail "$program does not run"; done
# Last, so that a kit that does not run is fetched again.
echo "$stamp" >"$kit/stamp"
