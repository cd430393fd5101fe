#!/usr/bin/env bash
# Installs what clrk needs on Debian 12: packages through apt (root only), .venv through pip, tests/*/node_modules through npm.
#
# --tests adds the servers and clients that the tests of any TCP run against; their services are neither started nor enabled.
#
# Idempotent: a second run asks dpkg and a stamp file, and returns in about a second. Works from any checkout path.
# Exits 0 when everything is there, 1 when something is missing; the last lines say what and why.
set -euo pipefail
umask 022 # the sandboxes' own uids read the venv through a bind mount

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
LOGS="$ROOT/.output/setup"
# The system's interpreter by its path: bcc and seccomp are Debian packages, importable from nowhere else.
PYTHON=/usr/bin/python3

step() { printf '== %s\n' "$*"; }
warn() { printf '   %s\n' "$*" >&2; }

TESTS=no
case "${1:-}" in
'') ;;
--tests) TESTS=yes ;;
*)
	printf 'usage: %s [--tests]\n' "$0" >&2
	exit 2
	;;
esac

failures=()
fail() { failures+=("$*"); warn "$*"; }

mkdir -p "$LOGS"

# --- Debian packages ---------------------------------------------------------------------------------------------

# package|how to see that it is there already, however it was installed
packages() {
	cat <<-'LIST'
		python3-venv|/usr/bin/python3 -c 'import ensurepip'
		python3-dev|test -e /usr/include/python3.11/Python.h || dpkg_has python3-dev
		python3-bpfcc|/usr/bin/python3 -c 'import bcc'
		python3-seccomp|/usr/bin/python3 -c 'import seccomp'
		build-essential|command -v gcc && command -v make && test -e /usr/include/stdlib.h
		libcap-dev|test -e /usr/include/sys/capability.h
		bubblewrap|command -v bwrap
		util-linux|command -v unshare
		e2fsprogs|test -x /usr/sbin/mkfs.ext4 || command -v mkfs.ext4
		procps|command -v ps
		iproute2|command -v ip
		curl|command -v curl
		ca-certificates|test -e /etc/ssl/certs/ca-certificates.crt
		nodejs|command -v node
		npm|command -v npm
		chromium|command -v chromium
		clang|command -v clang
		vagrant|command -v vagrant
		wrk|command -v wrk
	LIST
}

# The same for the tests' servers, real ones from Debian. aiosmtpd and no MTA: a host has one MTA, and keeps it.
test_packages() {
	cat <<-'LIST'
		openssh-server|test -x /usr/sbin/sshd
		openssh-client|command -v ssh && command -v ssh-keygen
		python3-aiosmtpd|/usr/bin/python3 -c 'import aiosmtpd'
		mariadb-server|test -x /usr/sbin/mariadbd
		mariadb-client|command -v mariadb
		postgresql|test -x /usr/lib/postgresql/15/bin/postgres || ls /usr/lib/postgresql/*/bin/postgres
		postgresql-client|command -v psql
		redis-server|command -v redis-server
		redis-tools|command -v redis-cli
		tinyproxy-bin|command -v tinyproxy
		git|command -v git
		wget|command -v wget
	LIST
}
TEST_UNITS=(ssh.service ssh.socket mariadb.service postgresql.service redis-server.service)

dpkg_has() { [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

missing_packages() {
	local package probe
	while IFS='|' read -r package probe; do
		eval "$probe" >/dev/null 2>&1 || printf '%s\n' "$package"
	done < <("$1")
}

have_headers() {
	[ -e "/lib/modules/$(uname -r)/build/include" ] || [ -e /sys/kernel/kheaders.tar.xz ] ||
		dpkg_has "linux-headers-$(dpkg --print-architecture)"
}

apt_run() { # apt_run LOG ARGUMENT...: quiet on the terminal, everything in the log
	local log="$LOGS/$1"
	shift
	DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 "$@" >"$log" 2>&1 || {
		tail -n 5 "$log" >&2
		return 1
	}
}

install_headers() {
	local exact any
	exact="linux-headers-$(uname -r)"
	any="linux-headers-$(dpkg --print-architecture)"
	if apt-cache show "$exact" >/dev/null 2>&1 && apt_run headers.log install --no-install-recommends "$exact"; then
		step "installed $exact"
	elif apt_run headers.log install --no-install-recommends "$any"; then
		step "no $exact in this package list; installed $any, which bcc can use as well"
	else
		fail "kernel headers: neither $exact nor $any could be installed (see $LOGS/headers.log); without them or kheaders bcc can not compile the BPF programs"
	fi
}

install_packages() {
	local missing headers=yes package
	mapfile -t missing < <(missing_packages packages)
	have_headers || headers=no
	if [ ${#missing[@]} -eq 0 ] && [ "$headers" = yes ]; then
		step "Debian packages: all there"
		return
	fi
	[ "$headers" = yes ] || missing+=("kernel headers")
	if ! command -v apt-get >/dev/null; then
		fail "no apt-get here; install by hand: ${missing[*]}"
		return
	fi
	if [ "$(id -u)" -ne 0 ]; then
		fail "not root, so apt was left alone; run 'sudo make setup' to install: ${missing[*]}"
		return
	fi
	step "apt: installing ${missing[*]}"
	apt_run update.log update || fail "apt-get update failed (see $LOGS/update.log)"
	[ "$headers" = yes ] || { unset 'missing[-1]' && install_headers; }
	[ ${#missing[@]} -eq 0 ] || apt_run install.log install --no-install-recommends "${missing[@]}" && return
	for package in "${missing[@]}"; do # one by one, to say which it is
		step "apt: $package"
		apt_run "apt-$package.log" install --no-install-recommends "$package" ||
			fail "$package could not be installed (see $LOGS/apt-$package.log)"
	done
}

# The servers come without their services: none is started now (policy-rc.d(8), put back as it was) or at the next boot,
# and nothing that is installed is removed for them.
install_test_packages() {
	local missing unit before=()
	mapfile -t missing < <(missing_packages test_packages)
	if [ ${#missing[@]} -eq 0 ]; then
		step "Debian packages of the tests: all there"
		return
	fi
	if ! command -v apt-get >/dev/null || [ "$(id -u)" -ne 0 ]; then
		fail "the tests' servers can not be installed without apt-get and root: ${missing[*]}"
		return
	fi
	step "apt: ${missing[*]} (for the tests; no service is started)"
	for unit in "${TEST_UNITS[@]}"; do
		[ ! -e "/etc/systemd/system/multi-user.target.wants/$unit" ] || before+=("$unit")
	done
	apt_run update.log update || fail "apt-get update failed (see $LOGS/update.log)"
	(
		set -e
		policy=/usr/sbin/policy-rc.d
		restore() {
			rm -f "$policy"
			[ ! -e "$policy.clrk" ] && [ ! -L "$policy.clrk" ] || mv "$policy.clrk" "$policy"
		}
		if [ -e "$policy" ] || [ -L "$policy" ]; then mv "$policy" "$policy.clrk"; fi
		trap restore EXIT
		trap 'exit 1' HUP INT TERM
		printf '#!/bin/sh\nexit 101\n' >"$policy"
		chmod 755 "$policy"
		apt_run tests.log install --no-install-recommends --no-remove "${missing[@]}"
	) || fail "the tests' servers could not be installed (see $LOGS/tests.log)"
	for unit in "${TEST_UNITS[@]}"; do # of a host that had none of them, none starts at boot
		case " ${before[*]} " in *" $unit "*) continue ;; esac
		[ ! -e "/etc/systemd/system/multi-user.target.wants/$unit" ] || systemctl --quiet disable "$unit" >>"$LOGS/tests.log" 2>&1 ||
			fail "$unit could not be disabled (see $LOGS/tests.log)"
	done
}

# --- Python ------------------------------------------------------------------------------------------------------

# Everything that decides what is in .venv; the checkout's path too, because a venv can not be moved.
wanted_stamp() {
	{
		printf '%s\n' "$ROOT"
		"$PYTHON" --version
		cat "$ROOT/pyproject.toml" "$ROOT/setup.py" "$ROOT/packaging/setup.sh" "$ROOT/src/clrk/core/wire.h"
		find "$ROOT/ebpf" "$ROOT/runtime/csrc" -type f \( -name _build.py -o -path '*/csrc/*' \) ! -name '*.o' -print0 | sort -z | xargs -0r cat
	} | sha256sum | cut -d' ' -f1
}

venv_works() { test -x "$ROOT/runtime/_launch" && "$VENV/bin/python" -I -c 'import clrk, clrk.ebpf._stamp, pytest, mcp, re2, bcc, seccomp, prctl' 2>>"$LOGS/imports.log"; }

install_venv() {
	local stamp
	if [ ! -x "$PYTHON" ]; then
		fail "$PYTHON is not there; clrk needs Debian's python3 (3.11 or newer)"
		return
	fi
	stamp="$(wanted_stamp)"
	if [ "$(cat "$VENV/.clrk-setup" 2>/dev/null)" = "$stamp" ] && venv_works; then
		step ".venv: up to date"
		return
	fi
	if [ ! -x "$VENV/bin/pip" ]; then
		step ".venv: creating"
		"$PYTHON" -m venv --clear --system-site-packages "$VENV" || {
			fail "python3 -m venv failed; is python3-venv installed?"
			return
		}
	fi
	step ".venv: pip itself (Debian's is too old for some wheels)"
	pip_run pip.log --upgrade pip || return 0
	step ".venv: clrk, its dependencies, the tools and the agents' SDKs (a minute or two the first time)"
	pip_run install.log --editable "$ROOT[dev,agents]" || return 0
	: >"$LOGS/imports.log"
	if venv_works; then
		printf '%s\n' "$stamp" >"$VENV/.clrk-setup"
	else
		fail "the environment is incomplete: $(tail -n 1 "$LOGS/imports.log")"
	fi
}

pip_run() {
	local log="$LOGS/$1"
	shift
	if ! "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off "$@" >"$log" 2>&1; then
		tail -n 15 "$log" >&2
		fail "pip install $* failed (see $log)"
		return 1
	fi
}

# --- Node: what tests drive or run as agents, exactly as the lock files say ------------------------------------------

# tests/nodejs is Node itself: Debian 12 has 18, and what drives the tests needs 20.
node_is_new() { node -e 'process.exit(parseInt(process.versions.node) < 20 ? 1 : 0)' 2>>"$LOGS/npm.log"; }

install_node_modules() {
	local lock folder stamp
	for lock in "$ROOT"/tests/*/package-lock.json; do
		folder="$(dirname "$lock")"
		[ "${folder##*/}" != nodejs ] || ! node_is_new || continue
		stamp="$(sha256sum <"$lock")"
		if [ "$(cat "$folder/node_modules/.clrk-setup" 2>/dev/null)" = "$stamp" ]; then
			step "${folder#"$ROOT"/}/node_modules: up to date"
			continue
		fi
		step "${folder#"$ROOT"/}/node_modules: npm ci"
		# No install scripts: nothing of it needs any, and they would run as root.
		if ! npm ci --prefix "$folder" --ignore-scripts --no-audit --no-fund >"$LOGS/npm.log" 2>&1; then
			tail -n 5 "$LOGS/npm.log" >&2
			fail "npm ci in $folder failed (see $LOGS/npm.log)"
			continue
		fi
		printf '%s\n' "$stamp" >"$folder/node_modules/.clrk-setup"
	done
}

# The gateway and the agents have uids of their own and read the product through bind mounts: a checkout that was made
# under a tight umask must let them. The folders above it do not matter.
make_readable() {
	chmod -R go+rX "$ROOT"/{src,runtime,ebpf,netns,gateway,examples} 2>>"$LOGS/chmod.log" ||
		fail "some files of $ROOT can not be made readable (see $LOGS/chmod.log); the gateway would not start"
}

# The gateway may write nothing of the product, its byte code neither: each start would compile all of it again.
compile_modules() {
	"$VENV/bin/python" -m compileall -q "$ROOT"/{src,runtime,ebpf,netns,gateway} >"$LOGS/compile.log" 2>&1 ||
		fail "some modules can not be compiled (see $LOGS/compile.log)"
}

# Under sudo the checkout is still its owner's: what we made in it is handed over, so that `make check` needs no root.
hand_over() {
	local made=("$VENV" "$ROOT/.output")
	[ "$(id -u)" -eq 0 ] && [ "$(stat -c %u "$ROOT")" -ne 0 ] || return 0
	made+=("$ROOT"/tests/*/node_modules "$ROOT"/{src,runtime,ebpf,netns,gateway})
	for path in "${made[@]}"; do
		[ ! -e "$path" ] || chown -R --reference="$ROOT" "$path"
	done
}

install_packages
: >"$LOGS/tests.failures"
( # apt beside pip and npm
	failures=()
	[ "$TESTS" = no ] || install_test_packages
	printf '%s\n' "${failures[@]}" >"$LOGS/tests.failures"
) &
install_venv
install_node_modules
wait $! || fail "installing the tests' servers broke off (see $LOGS/tests.log)"
while read -r line; do
	[ -z "$line" ] || failures+=("$line")
done <"$LOGS/tests.failures"
compile_modules
make_readable
hand_over

if [ ${#failures[@]} -gt 0 ]; then
	step "setup is NOT complete:"
	printf '   - %s\n' "${failures[@]}"
	exit 1
fi
step "setup complete; the commands are $VENV/bin/clrk and clrk-runtime"
