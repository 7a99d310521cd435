package e2e

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/shared/lab"
	"github.com/relais-mta/relais/shared/lab/fleet"
)

// keyLooked is when the leader has looked for a new key in DNS at the latest: it
// lets twice the time pass from look to look, up to five minutes.
const keyLooked = 6 * time.Minute

// signingDomain is what `domain show` says of the keys.
type signingDomain struct {
	Keys []struct {
		Selector  string `json:"selector"`
		Algorithm string `json:"algorithm"`
		State     string `json:"state"`
	} `json:"keys"`
	Records []struct {
		Name string `json:"name"`
		Zone string `json:"zone"`
	} `json:"records"`
}

// in returns the selectors of keys in a state.
func (d *signingDomain) in(state string) (out []string) {
	for _, k := range d.Keys {
		if k.State == state {
			out = append(out, k.Selector)
		}
	}
	slices.Sort(out)
	return out
}

// TestKeysAreRotated: mail is signed with two keys, with two others once DNS
// shows these and not before, and with the former ones after a rollback. Every
// mail verifies with what DNS shows at the time.
func TestKeysAreRotated(t *testing.T) {
	f := start(t, fleet.Config{Open: true, Policy: map[string]string{"delivery": "connect_timeout = \"3s\"\nhost_backoff = \"1s\"\nmin_dns_ttl = \"1s\"\nidle_session = \"3s\"\ndkim_publish_hold = \"0s\"\n"}})
	domain := func(args ...string) (d signingDomain) {
		t.Helper()
		out, err := f.Ctl(within(t, time.Minute), append([]string{"domain"}, append(args, fleet.Domain, "--json")...)...)
		if err == nil {
			err = json.Unmarshal(out, &d)
		}
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	to := recipients(t, f, 5)
	sent := int64(0)
	// signed sends mail and checks that every one of it has a signature of each
	// selector, and no other.
	signed := func(tag string, selectors []string) {
		t.Helper()
		if err := f.WaitApplied(within(t, time.Minute)); err != nil {
			t.Fatal(err)
		}
		submitted, err := f.Submit(within(t, time.Minute), fleet.Stream{Recipients: to, Size: 2000, Connections: 2, Tag: tag})
		if err != nil {
			t.Fatal(err)
		}
		settle(t, f, submitted)
		found := 0
		for _, p := range f.Lab.Providers() {
			for m, err := range f.Lab.Mails(p.Name) {
				if err != nil {
					t.Fatal(err)
				}
				if m.From == "" || !strings.Contains(m.MessageID, tag) {
					continue
				}
				_, content, err := f.Lab.Mail(p.Name, m.ID)
				if err != nil {
					t.Fatal(err)
				}
				found++
				var got []string
				for field := range strings.SplitSeq(string(content), "DKIM-Signature: ") {
					if _, rest, ok := strings.Cut(field, ";\r\n\ts="); ok {
						selector, _, _ := strings.Cut(rest, ";")
						got = append(got, selector)
					}
				}
				slices.Sort(got)
				if !slices.Equal(got, selectors) {
					t.Errorf("%s: signed by %v, want %v", tag, got, selectors)
				}
			}
		}
		if found == 0 {
			t.Fatalf("%s: no mail arrived", tag)
		}
		sent += int64(found)
	}
	eventually(t, keyLooked, "the Ed25519 key of a new domain to sign", func() bool { d := domain("show"); return len(d.in("signing")) == 2 })
	first := domain("show")
	signed("firstkeys", first.in("signing"))

	rotated := domain("dkim", "rotate")
	fresh := rotated.in("new")
	if len(fresh) != 2 {
		t.Fatalf("rotate made %v", fresh)
	}
	signed("beforedns", first.in("signing")) // DNS does not show the new keys
	for _, r := range rotated.Records {
		if slices.ContainsFunc(fresh, func(s string) bool { return strings.HasPrefix(r.Name, s+"._domainkey.") }) {
			if err := f.Lab.AddRecords(r.Zone); err != nil {
				t.Fatal(err)
			}
		}
	}
	eventually(t, keyLooked, "the relay to sign with the new keys alone", func() bool {
		d := domain("show")
		return slices.Equal(d.in("signing"), fresh) && len(d.in("retired")) == 2
	})
	signed("newkeys", fresh)
	domain("dkim", "rollback")
	signed("rolledback", first.in("signing"))
	if err := f.Lab.WaitFor(within(t, time.Minute), func(r lab.Report) bool { return r.DKIM.Complete }); err != nil {
		t.Fatal(err)
	}
	if rep := f.Lab.Report(); rep.DKIM.Fail != 0 || rep.DKIM.None != 0 || rep.DKIM.Pass < sent {
		t.Errorf("signatures: %+v of %d mails", rep.DKIM, sent)
	}
}
