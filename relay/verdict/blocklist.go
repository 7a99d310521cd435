package verdict

import "strings"

// zones are public blocklists by the names that replies use. The first part is
// looked for in the text, the second is what it is called in events.
var zones = [...]struct{ token, zone string }{
	{"dbl.spamhaus.org", "dbl.spamhaus.org"},
	{"zen.spamhaus.org", "zen.spamhaus.org"},
	{"sbl.spamhaus.org", "sbl.spamhaus.org"},
	{"xbl.spamhaus.org", "xbl.spamhaus.org"},
	{"pbl.spamhaus.org", "pbl.spamhaus.org"},
	{"sbl-xbl.spamhaus.org", "sbl-xbl.spamhaus.org"},
	{"spamhaus", "spamhaus.org"},
	{"bl.spamcop.net", "bl.spamcop.net"},
	{"spamcop", "bl.spamcop.net"},
	{"b.barracudacentral.org", "b.barracudacentral.org"},
	{"barracudacentral", "b.barracudacentral.org"},
	{"uceprotect", "uceprotect.net"},
	{"multi.surbl.org", "multi.surbl.org"},
	{"surbl", "multi.surbl.org"},
	{"multi.uribl.com", "multi.uribl.com"},
	{"uribl", "multi.uribl.com"},
	{"ix.dnsbl.manitu.net", "ix.dnsbl.manitu.net"},
	{"nixspam", "ix.dnsbl.manitu.net"},
	{"bl.mailspike.net", "bl.mailspike.net"},
	{"mailspike", "bl.mailspike.net"},
	{"psbl.surriel.com", "psbl.surriel.com"},
	{"dnsbl.sorbs.net", "dnsbl.sorbs.net"},
	{"hostkarma.junkemailfilter.com", "hostkarma.junkemailfilter.com"},
	{"backscatterer.org", "ips.backscatterer.org"},
	{"invaluement", "invaluement.com"},
	{"abusix", "combined.mail.abusix.zone"},
	{"truncate.gbudb.net", "truncate.gbudb.net"},
	{"senderscore.com", "bl.score.senderscore.com"},
}

// listed are the ways to say that a list has an address. A name of a list
// alone is not enough: it may stand in a signature or a link.
var listed = [...]string{"blocked using", "listed at", "listed in", "listed on", "listed by", "found in", "found on",
	"blocked by", "blocked due to", "blocklist", "blacklist", "black list", "block list", "blocked -", "rejected by",
	"rejected due to", "is listed", "dnsbl", "rbl", "see http", "client host", "query/ip"}

// blocklisted finds a refusal that names a public blocklist.
func blocklisted(s *subject) (Verdict, bool) {
	if s.code < 400 {
		return Verdict{}, false
	}
	zone := zoneIn(s.text)
	if zone == "" {
		return Verdict{}, false
	}
	for _, phrase := range listed {
		if strings.Contains(s.text, phrase) {
			v := s.verdict(&blocklistRule)
			v.Zone = zone
			return v, true
		}
	}
	return Verdict{}, false
}

var blocklistRule = rule{name: "dnsbl-named", class: Blocklist}

// zoneIn returns the blocklist that a text names, "" if none is known. An
// unknown zone is read from the word behind "blocked using", the wording of
// common servers.
func zoneIn(text string) string {
	for i := range zones {
		if strings.Contains(text, zones[i].token) {
			return zones[i].zone
		}
	}
	_, rest, ok := strings.Cut(text, "blocked using ")
	if !ok {
		return ""
	}
	name, _, _ := strings.Cut(rest, " ")
	name = strings.Trim(name, ".,;:()<>[]\"'")
	const maxNameBytes = 253
	if len(name) > maxNameBytes || strings.Count(name, ".") == 0 {
		return ""
	}
	for i := range len(name) {
		c := name[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '.' && c != '-' {
			return ""
		}
	}
	return name
}
