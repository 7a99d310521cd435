#!/bin/sh
# bench-peers.sh: makes the mail servers that make bench measures beside Relais:
#
#   postfix    in a Debian of its own, by scripts/more-peers.sh
#   haraka     from npm, at the versions of scripts/bench/haraka/package-lock.json
#
#   scripts/bench-peers.sh                 both
#   scripts/bench-peers.sh haraka,relais   those of them that the list names
#
# Both go to /var/cache/relais-peers. Nothing is printed and nothing is changed
# when they are there. Needs root, Debian and Node with npm.
set -eu

to=/var/cache/relais-peers/1
here=$(cd "$(dirname "$0")" && pwd)
lockfile=$here/bench/haraka/package-lock.json

fail() {
	echo "bench-peers: $*" >&2
	exit 1
}

case "${1-}" in
-h | --help)
	sed -n '2,11s/^# \{0,1\}//p' "$0"
	exit 0
	;;
-*) fail "unknown option $1" ;;
esac
systems=${1:-postfix,haraka}

wanted() {
	case ",$systems," in
	*",$1,"*) return 0 ;;
	esac
	return 1
}

if wanted postfix && [ ! -d "$to/postfix" ]; then
	"$here/more-peers.sh"
fi
if ! wanted haraka || cmp -s "$lockfile" "$to/haraka/package-lock.json"; then
	exit 0
fi
[ "$(id -u)" -eq 0 ] || fail "$to/haraka is missing or old; run as root: $0 haraka"
command -v npm >/dev/null 2>&1 || fail "npm is missing; install Node with npm"
mkdir -p "$to"
# One run at a time.
exec 9>"$to/lock-haraka"
flock 9
! cmp -s "$lockfile" "$to/haraka/package-lock.json" || exit 0
work=$(mktemp -d "$to/work.XXXXXX")
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
mkdir "$work/haraka"
cp "$here/bench/haraka/package.json" "$lockfile" "$work/haraka/"
(cd "$work/haraka" && npm ci --omit=optional --ignore-scripts --no-audit --no-fund) >"$work/npm.log" 2>&1 || {
	tail -n 20 "$work/npm.log" >&2
	fail "cannot install Haraka; the lines above say why"
}
rm -rf "$to/haraka"
mv "$work/haraka" "$to/haraka"
