#!/bin/sh
# debian-peers.sh: installs the Debian packages whose programs the tests talk
# to. Run as root it installs what is missing; otherwise it names it and fails,
# because a test whose peer is missing fails and never skips.
#
#   scripts/debian-peers.sh                    what `make test` needs
#   scripts/debian-peers.sh postfix chromium   the named packages only
#
# Nothing is printed and nothing is changed when all are there. No service is
# started.
set -eu

# swaks, curl, python3: clients of another make    opendkim: checks our signatures
# python3-dkim, python3-nacl: check Ed25519 signatures
# unbound, nsd, ldnsutils: name servers, one that validates, and signed zones
# e2fsprogs, mount, util-linux: loop file systems for the full-disk and
# power-cut tests                            iproute2: source addresses
default="swaks libnet-ssleay-perl python3 python3-dkim python3-nacl e2fsprogs mount util-linux iproute2 opendkim opendkim-tools curl unbound nsd ldnsutils"

# What other targets ask for by name.
known="$default postfix postgresql chromium mmdebstrap systemd-container lintian procps"

fail() {
	echo "debian-peers: $*" >&2
	exit 1
}

case "${1-}" in
-h | --help)
	sed -n '2,11s/^# \{0,1\}//p' "$0"
	echo "Packages: $known"
	exit 0
	;;
-*) fail "unknown option $1; write package names only" ;;
esac

# Word splitting of the list of package names is wanted.
# shellcheck disable=SC2086
[ $# -gt 0 ] || set -- $default

missing=""
for package in "$@"; do
	case "$package" in
	'' | *[!a-z0-9+.-]*) fail "\"$package\" is not the name of a package" ;;
	esac
	status=""
	if command -v dpkg-query >/dev/null 2>&1; then
		status=$(dpkg-query -W -f '${Status}' "$package" 2>/dev/null || true)
	fi
	[ "$status" = "install ok installed" ] || missing="$missing $package"
done
[ -n "$missing" ] || exit 0

command -v apt-get >/dev/null 2>&1 ||
	fail "this is no Debian system; install the programs of these Debian packages:$missing"
[ "$(id -u)" -eq 0 ] ||
	fail "missing packages:$missing; run as root: $0$missing"

# One run at a time: several test targets may start together.
exec 9>/run/lock/relais-debian-peers.lock
flock 9

log=$(mktemp)
barrier=/usr/sbin/policy-rc.d
made=""
tidy() {
	[ -z "$made" ] || rm -f "$barrier"
	rm -f "$log"
}
trap tidy EXIT
trap 'exit 1' HUP INT TERM

# Debian asks this file before it starts a service: 101 forbids it.
if [ ! -e "$barrier" ]; then
	printf '#!/bin/sh\nexit 101\n' >"$barrier"
	chmod 755 "$barrier"
	made=yes
fi

apt() {
	DEBIAN_FRONTEND=noninteractive apt-get -q -y -o DPkg::Lock::Timeout=300 \
		-o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold "$@" >>"$log" 2>&1
}

# The lists may be absent or old; they are fetched only when that is the case.
# shellcheck disable=SC2086
if ! apt install --no-install-recommends $missing; then
	if ! { apt update && apt install --no-install-recommends $missing; }; then
		tail -n 20 "$log" >&2
		fail "cannot install$missing; the lines above say why"
	fi
fi
