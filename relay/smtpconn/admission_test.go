package smtpconn

import (
	"net/netip"
	"testing"
	"time"
)

// New connections are bounded by the minute, in total and by client, and so is
// the memory that counts them.
func TestMinute(t *testing.T) {
	var m minute
	now := time.Unix(1_800_000_000, 0).Truncate(time.Minute)
	limits := Limits{ConnectionsPerMinute: 5, ConnectionsPerMinutePerIP: 2}
	one, two := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	for i, tt := range []struct {
		client netip.Addr
		after  time.Duration
		want   string
	}{
		{one, 0, ""}, {one, 0, ""}, {one, 59 * time.Second, "connection_rate_per_ip"}, {two, 0, ""}, {two, 0, ""},
		{netip.MustParseAddr("192.0.2.3"), 0, ""}, {netip.MustParseAddr("192.0.2.4"), 0, "connection_rate"}, {one, time.Minute, ""},
	} {
		if got := m.take(tt.client, limits, now.Add(tt.after)); got != tt.want {
			t.Errorf("step %d: %q, want %q", i, got, tt.want)
		}
	}
	for i := range maxMinuteClients + 10 {
		m.take(netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)}), Limits{}, now)
	}
	if len(m.clients) > maxMinuteClients {
		t.Errorf("%d clients are counted", len(m.clients))
	}
}

func TestConnectionRates(t *testing.T) {
	for want, change := range map[string]func(*Limits){
		"421 4.7.0 Too many new connections from your address": func(l *Limits) { l.ConnectionsPerMinutePerIP = 2 },
		"421 4.3.2 Too many new connections":                   func(l *Limits) { l.ConnectionsPerMinute = 2 },
	} {
		_, _, addr := start(t, OfferSTARTTLS, func(_ *Config, l *Limits) { change(l) })
		refused := 0
		for range 7 { // however the minutes lie, 3 of them are in one
			p := connect(t, addr)
			if line := p.reply(); line[:3] == "421" {
				refused++
				if line[:len(want)] != want {
					t.Errorf("reply %q, want %q", line, want)
				}
			}
			_ = p.Close()
		}
		if refused < 3 {
			t.Errorf("%d of 7 connections were refused", refused)
		}
	}
}
