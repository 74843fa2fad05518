# Functions for the tools in tools/: system packages and the virtual environment. Sourced by bash.
#
#   ensure_packages GROUP...   install what is missing of the groups below (Debian 12 and 13), or name it and exit 1
#   ensure_venv                .venv with the project and its test extra installed, up to date with its sources
#
# Both are quick when there is nothing to do. Progress goes to stderr.

PACKAGES_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)

# Each line: Debian package, and a file or command that it brings (how its presence is seen on any distribution).
packages_of() {
    case $1 in
    host) # the virtual environment and the C extension
        echo "python3 python3"
        echo "python3-venv python:ensurepip"
        echo "python3-dev python:header"
        echo "gcc cc"
        echo "libc6-dev /usr/include/stdlib.h"
        echo "libudev1 lib:libudev.so.1"
        ;;
    unit) # the C core under sanitizers, in a weak memory model, and for aarch64
        echo "g++ g++"
        echo "relacy-dev dpkg:relacy-dev"
        echo "gcc-aarch64-linux-gnu aarch64-linux-gnu-gcc"
        echo "libc6-dev-arm64-cross dpkg:libc6-dev-arm64-cross"
        echo "qemu-user-static qemu-aarch64-static"
        echo "systemd systemd-analyze" # checks the units of the documents
        ;;
    loopback) # our own devices; links in network namespaces
        echo "iproute2 ip"
        echo "iproute2 bridge"
        echo "util-linux unshare"
        ;;
    qemu) # real devices without a guest
        echo "qemu-system-x86 qemu-system-x86_64"
        echo "iproute2 ip"
        echo "util-linux unshare"
        echo "dpkg dpkg-deb"
        echo "debian-archive-keyring /usr/share/keyrings/debian-archive-keyring.gpg"
        echo "qemu-utils qemu-storage-daemon" # Debian 12 has it in qemu-system-common, which qemu-system-x86 needs
        ;;
    guest) # the guest lab
        packages_of qemu
        echo "busybox-static busybox"
        echo "squashfs-tools mksquashfs"
        echo "kmod depmod"
        echo "zstd zstd"
        echo "make make" # VFIO's modules, built anew for one of the kernels
        echo "xz-utils xz"
        echo "dpkg dpkg-deb"
        echo "debian-archive-keyring /usr/share/keyrings/debian-archive-keyring.gpg"
        local package
        while read -r package; do
            echo "$package dpkg:$package"
        done < <(sed 's/#.*//; /^[[:space:]]*$/d' "$PACKAGES_ROOT/tools/lib/guest-packages")
        ;;
    *)
        echo "packages.sh: unknown group $1" >&2
        return 1
        ;;
    esac
}

package_present() {
    local probe=$1
    case $probe in
    /*) [ -e "$probe" ] ;;
    python:ensurepip) python3 -c 'import venv, ensurepip' 2>/dev/null ;;
    python:header)
        python3 -c 'import os, sysconfig, sys
sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' 2>/dev/null
        ;;
    lib:*) compgen -G "/lib/*/${probe#lib:}" >/dev/null || compgen -G "/usr/lib*/${probe#lib:}" >/dev/null ;;
    dpkg:*) [ -e "/var/lib/dpkg/info/${probe#dpkg:}.list" ] || compgen -G "/var/lib/dpkg/info/${probe#dpkg:}:*.list" >/dev/null ;;
    *) PATH="$PATH:/usr/sbin:/sbin" command -v "$probe" >/dev/null ;;
    esac
}

# Prints the packages of the groups that are not there, one a line.
missing_packages() {
    local group package probe
    for group in "$@"; do
        while read -r package probe; do
            package_present "$probe" || echo "$package"
        done < <(packages_of "$group")
    done | sort -u
}

is_supported_debian() {
    [ -r /etc/os-release ] || return 1
    (
        . /etc/os-release
        [ "${ID:-}" = debian ] && { [ "${VERSION_ID:-}" = 12 ] || [ "${VERSION_ID:-}" = 13 ]; }
    )
}

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "guestpv: root is needed, and there is no sudo, for: $*" >&2
        return 1
    fi
}

APT_WAIT=600 # seconds that another apt may hold a lock; a machine that has just started updates itself

# apt-get, once others have finished: apt itself waits for dpkg's lock only, not for that of its lists.
# Says on descriptor 3 that it waits.
apt_get() {
    local until=$((SECONDS + APT_WAIT)) told="" said status
    said=$(mktemp)
    while :; do
        status=0
        as_root env LC_ALL=C DEBIAN_FRONTEND=noninteractive \
            apt-get -q -o "DPkg::Lock::Timeout=$APT_WAIT" "$@" >"$said" 2>&1 || status=$?
        [ $status != 0 ] && [ $SECONDS -lt $until ] && grep -q 'Could not get lock' "$said" || break
        [ -n "$told" ] || echo "guestpv: another apt is at work; waiting for it, at most $APT_WAIT s" >&3
        told=yes
        sleep 2
    done
    cat "$said"
    rm -f "$said"
    return $status
}

ensure_packages() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ ${#missing[@]} -eq 0 ] && return 0
    if ! is_supported_debian; then
        echo "guestpv: this is neither Debian 12 nor 13; install what these Debian packages bring, then try again:" >&2
        printf '  %s\n' "${missing[@]}" >&2
        exit 1
    fi
    echo "guestpv: installing Debian packages: ${missing[*]}" >&2
    local log
    log=$(mktemp)
    if ! {
        apt_get update &&
            apt_get -y --no-install-recommends install "${missing[@]}"
    } 3>&2 >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        echo "guestpv: could not install them; the whole log: $log" >&2
        exit 1
    fi
    rm -f "$log"
    mapfile -t missing < <(missing_packages "$@")
    if [ ${#missing[@]} -ne 0 ]; then
        echo "guestpv: still missing after the installation: ${missing[*]}" >&2
        exit 1
    fi
}

# Hash of the named files, for the stamps below.
hash_of() {
    (cd "$PACKAGES_ROOT" && cat "$@" 2>/dev/null | sha256sum | cut -d' ' -f1)
}

ensure_venv() {
    local venv=$PACKAGES_ROOT/.venv log
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "guestpv: $(python3 --version) is too old: Python 3.11 or newer is needed" >&2
        exit 1
    fi
    mkdir -p "$venv"
    exec 9>"$venv/.lock"
    flock 9
    local project sources
    project=$(hash_of pyproject.toml)
    sources=$(cd "$PACKAGES_ROOT" && hash_of setup.py guestpv/core/*.[ch] guestpv/core/*build*.py)
    log=$venv/install.log
    if [ "$(cat "$venv/.project" 2>/dev/null)" != "$project" ] || [ ! -x "$venv/bin/python" ]; then
        echo "guestpv: setting up .venv (a minute or so the first time)" >&2
        if ! {
            { [ -x "$venv/bin/pip" ] || python3 -m venv "$venv"; } &&
                "$venv/bin/pip" install --disable-pip-version-check -e "$PACKAGES_ROOT[test]"
        } >"$log" 2>&1; then
            tail -n 20 "$log" >&2
            echo "guestpv: could not set up .venv; the whole log: $log" >&2
            exit 1
        fi
        echo "$project" >"$venv/.project"
        echo "$sources" >"$venv/.sources"
    elif [ "$(cat "$venv/.sources" 2>/dev/null)" != "$sources" ]; then
        echo "guestpv: building the C extension" >&2
        if ! (cd "$PACKAGES_ROOT" && "$venv/bin/python" setup.py -q build_ext --inplace) >"$log" 2>&1; then
            tail -n 20 "$log" >&2
            echo "guestpv: could not build the C extension; the whole log: $log" >&2
            exit 1
        fi
        echo "$sources" >"$venv/.sources"
    fi
    exec 9>&-
}
