package tlspolicy

import (
	"crypto/tls"
	"testing"
)

// TestConfigOfHosts holds what opportunistic TLS needs: no version
// older than 1.2, and each host asked for by its own name.
func TestConfigOfHosts(t *testing.T) {
	base := Config()
	one, two := ForHost(base, "mx1.example.net"), ForHost(base, "mx2.example.net")
	if one.ServerName != "mx1.example.net" || two.ServerName != "mx2.example.net" || base.ServerName != "" {
		t.Errorf("names %q, %q, and %q in what both came from", one.ServerName, two.ServerName, base.ServerName)
	}
	if base.MinVersion != tls.VersionTLS12 || one.MinVersion != tls.VersionTLS12 {
		t.Errorf("TLS from version %#x on", one.MinVersion) // RFC 8996
	}
	for version, want := range map[uint16]string{tls.VersionTLS12: "TLS1.2", tls.VersionTLS13: "TLS1.3", tls.VersionTLS11: "TLS?"} {
		if got := VersionName(version); got != want {
			t.Errorf("version %#x is called %q, want %q", version, got, want)
		}
	}
}
