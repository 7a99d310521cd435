#!/bin/sh
# more-peers.sh: makes what the tests talk to and apt cannot install side by
# side on one machine:
#
#   postfix, exim, opensmtpd   a Debian each with that mail server in it
#   mails/                     the mails of Python's and SpamAssassin's packages
#   nodemailer/                Nodemailer, at the versions of its lock file
#
# All of it goes to /var/cache/relais-peers, is made once, and takes about a
# minute and 700 MB. Nothing is printed and nothing is changed when it is there.
# No service is started. Needs root, and Debian.
set -eu

# The number goes up when something here changes; shared/lab/peers names it too.
to=/var/cache/relais-peers/1
here=$(cd "$(dirname "$0")" && pwd)
lockfile=$here/../control/e2e/testdata/nodemailer/package-lock.json

fail() {
	echo "more-peers: $*" >&2
	exit 1
}

complete() {
	for part in postfix exim opensmtpd mails nodemailer; do
		[ -d "$to/$part" ] || return 1
	done
	cmp -s "$lockfile" "$to/nodemailer/package-lock.json"
}

case "${1-}" in
'') ;;
-h | --help)
	sed -n '2,12s/^# \{0,1\}//p' "$0"
	exit 0
	;;
*) fail "takes no arguments" ;;
esac
! complete || exit 0

[ "$(id -u)" -eq 0 ] || fail "$to is not complete; run as root: $0"
command -v npm >/dev/null 2>&1 || fail "npm is missing; install Node with npm"
"$here/debian-peers.sh" mmdebstrap

mkdir -p "$to"
# One run at a time: several test targets may start together.
exec 9>"$to/lock"
flock 9
work=$(mktemp -d "$to/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM

suite=$(sed -n 's/^VERSION_CODENAME=//p' /etc/os-release)
# The mirrors that apt is set up for here, main only.
mirrors() {
	apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) main' 'Created-By: Packages' 'Component: main' |
		grep -E " $suite(-updates|-security)? main\$" | sort -u
}
[ -n "$(mirrors)" ] || apt-get -q update >"$work/log" 2>&1 || true
[ -n "$(mirrors)" ] || fail "apt knows no mirror of $suite main: this needs Debian, with its mirrors in /etc/apt"

# debian NAME PACKAGES: what it mounts is gone with it, however it ends.
debian() {
	[ ! -d "$to/$1" ] || return 0
	mirrors | unshare --mount --propagation=private mmdebstrap --variant=minbase --include="$2" \
		--dpkgopt=force-unsafe-io --aptopt='Acquire::Languages "none"' --aptopt='Acquire::Retries "3"' "$suite" "$work/$1" - >"$work/$1.log" 2>&1 || {
		tail -n 20 "$work/$1.log" >&2
		fail "no Debian with $2; the lines above say why"
	}
	mv "$work/$1" "$to/$1"
}

# mails: only files are taken from these packages, so they are not installed.
mails() {
	[ ! -d "$to/mails" ] || return 0
	mkdir -p "$work/packages" "$work/mails/python" "$work/mails/spamassassin"
	(
		cd "$work/packages"
		python=$(apt-cache depends python3 | sed -n 's/.*Depends: python\(3\.[0-9]*\)$/\1/p' | head -n 1)
		apt-get -q download "libpython$python-testsuite" spamassassin || {
			apt-get -q update
			apt-get -q download "libpython$python-testsuite" spamassassin
		}
		for package in *.deb; do
			dpkg-deb -x "$package" tree
		done
		cp tree/usr/lib/python3*/test/test_email/data/msg_*.txt "$work/mails/python/"
		cp tree/usr/share/doc/spamassassin/examples/sample-*.txt "$work/mails/spamassassin/"
	) >"$work/mails.log" 2>&1 || {
		tail -n 20 "$work/mails.log" >&2
		fail "cannot get the mails of Debian's packages; the lines above say why"
	}
	mv "$work/mails" "$to/mails"
}

nodemailer() {
	! cmp -s "$lockfile" "$to/nodemailer/package-lock.json" || return 0
	mkdir "$work/nodemailer"
	cp "$(dirname "$lockfile")/package.json" "$lockfile" "$work/nodemailer/"
	(cd "$work/nodemailer" && npm ci --ignore-scripts --no-audit --no-fund) >"$work/npm.log" 2>&1 || {
		tail -n 20 "$work/npm.log" >&2
		fail "cannot install Nodemailer; the lines above say why"
	}
	rm -rf "$to/nodemailer"
	mv "$work/nodemailer" "$to/nodemailer"
}

jobs=""
debian postfix postfix,libsasl2-modules &
jobs="$jobs $!"
debian exim exim4-daemon-light &
jobs="$jobs $!"
debian opensmtpd opensmtpd &
jobs="$jobs $!"
mails &
jobs="$jobs $!"
nodemailer &
jobs="$jobs $!"
status=0
for job in $jobs; do
	wait "$job" || status=1
done
exit $status
