package smtpconn

import (
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/relais-mta/relais/relay"
)

func extended(cfg *Config, limits *Limits) {
	if limits != nil {
		limits.MaxErrorsPerSession, limits.MaxCommandsPerSession = 1000, 1000
	}
	cfg.DSN, cfg.SMTPUTF8, cfg.Chunking, cfg.BinaryMIME, cfg.MaxHold = true, true, true, true, 30*24*time.Hour
}

func TestParameters(t *testing.T) {
	_, _, addr := start(t, OfferSTARTTLS, extended)
	p := dial(t, addr)
	ehlo := p.do("EHLO c", "250-")
	for _, want := range []string{"DSN", "SMTPUTF8", "CHUNKING", "BINARYMIME", "FUTURERELEASE 2592000 2"} {
		if !strings.Contains(ehlo, "250-"+want) {
			t.Errorf("EHLO says %q, want %s in it", ehlo, want)
		}
	}
	for _, tt := range []struct{ params, want string }{
		{"", "250"}, {"SIZE=99999", "250"}, {"SIZE=", "501 5.5.4"}, {"SIZE=-1", "501"}, {"SIZE=9999999999999999999", "501"}, {"SIZE=1 size=2", "501"},
		{"BODY=7bit", "250"}, {"BODY=8BITMIME", "250"}, {"BODY=BINARYMIME", "250"}, {"BODY=x", "501"}, {"BODY", "501"},
		{"SMTPUTF8", "250"}, {"SMTPUTF8=", "501"}, {"SMTPUTF8=yes", "501"},
		{"RET=FULL", "250"}, {"RET=hdrs", "250"}, {"RET=", "501"}, {"RET=BOTH", "501"},
		{"ENVID=a+2Bb+3D", "250"}, {"ENVID=", "501"}, {"ENVID=a+2bb", "501"}, {"ENVID=a+2", "501"}, {"ENVID=a+", "501"}, {"ENVID=a+0D+0AX", "501"},
		{"ENVID=a=b", "501"}, {"ENVID=\xc3\xa9", "501"}, {"ENVID=" + strings.Repeat("x", 100), "250"}, {"ENVID=" + strings.Repeat("x", 101), "501"},
		{"HOLDFOR=60", "250"}, {"HOLDFOR=2592000", "250"}, {"HOLDFOR=2592060", "501"}, {"HOLDFOR=", "501"}, {"HOLDFOR=1.5", "501"}, {"HOLDFOR=0000000001", "501"},
		{"HOLDUNTIL=2020-01-01T00:00:00Z", "250"}, {"HOLDUNTIL=tomorrow", "501"}, {"HOLDUNTIL=2199-01-01T00:00:00Z", "501"}, {"HOLDFOR=1 HOLDUNTIL=2020-01-01T00:00:00Z", "501"},
		{"AUTH=<>", "250"}, {"AUTH=e+3Dmc2@example.com", "250"}, {"AUTH=", "501"}, {"AUTH=a+0A", "501"},
		{"FOO", "555 5.5.4"}, {"NOTIFY=NEVER", "555"}, {"BY=60;R", "555"}, {"MT-PRIORITY=1", "555"}, {"\x01=2", "555"},
	} {
		if p.do("MAIL FROM:<a@example.com> "+tt.params, tt.want); tt.want == "250" {
			p.do("RSET", "250")
		}
	}
	p.do("MAIL FROM:<a@example.com>", "250")
	for _, tt := range []struct{ params, want string }{
		{"NOTIFY=NEVER", "250"}, {"NOTIFY=success,FAILURE,Delay", "250"}, {"NOTIFY=", "501"}, {"NOTIFY=NEVER,FAILURE", "501"}, {"NOTIFY=FAILURE,FAILURE", "501"},
		{"NOTIFY=FAILURE,", "501"}, {"NOTIFY=FAILURE NOTIFY=DELAY", "501"}, {"NOTIFY=NEVER,NEVER", "501"},
		{"ORCPT=rfc822;ann+2Bx@example.net", "250"}, {"ORCPT=x400;+2FC+3DUS", "250"}, {"ORCPT=ann@example.net", "501"}, {"ORCPT=;ann", "501"}, {"ORCPT=rfc822;", "501"},
		{"ORCPT=rfc822;a+0D+0Ab", "501"}, {"ORCPT=rf c822;x", "501"}, {"ORCPT=r_c;x", "501"}, {"ORCPT=rfc822;" + strings.Repeat("x", 493), "250"}, {"ORCPT=rfc822;" + strings.Repeat("x", 494), "501"},
		{`ORCPT=utf-8;\x{E9}@example.net`, "250"}, {"ORCPT=utf-8;\xc3\xa9@example.net", "501"}, {`ORCPT=utf-8;\x{0A}`, "501"}, {`ORCPT=utf-8;\x{D800}`, "501"}, {`ORCPT=utf-8;\x{e9}`, "501"}, {`ORCPT=utf-8;\x`, "501"},
		{"SIZE=1", "555"}, {"FOO=1", "555"},
	} {
		p.do("RCPT TO:<b@example.net> "+tt.params, tt.want)
	}
	p.do("RSET", "250")
	p.do("MAIL FROM:<a@example.com> SMTPUTF8", "250")
	p.do("RCPT TO:<b@example.net> ORCPT=utf-8;\xc3\xa9@example.net", "250")
	p.do("RCPT TO:<b@example.net> ORCPT=utf-8;\xc3@example.net", "501")
}

// RFC 6531 section 3.5: who does not say SMTPUTF8 cannot give other addresses.
func TestAddressesOutsideASCIINeedTheParameter(t *testing.T) {
	_, _, addr := start(t, OfferSTARTTLS, extended)
	p := dial(t, addr)
	p.do("EHLO c", "250-")
	p.do("MAIL FROM:<jos\u00e9@example.com>", "553 5.6.7")
	p.do("MAIL FROM:<a@example.com>", "250")
	p.do("RCPT TO:<jos\u00e9@example.net>", "553 5.6.7")
	p.do("RCPT TO:<b@b\u00fccher.example>", "553 5.6.7")
	p.do("RSET", "250")
	p.do("MAIL FROM:<a@example.com> SMTPUTF8", "250")
	p.do("RCPT TO:<jos\u00e9@b\u00fccher.example>", "250")
	p.do("RCPT TO:<jos\xe9@example.net>", "550") // not UTF-8; the test's session refuses every bad address so
	p.do("RCPT TO:<a\u0085b@example.net>", "550")
	p.do("RSET", "250")
	p.do("MAIL FROM:<a@example.com>", "250") // the parameter was for one message
	p.do("RCPT TO:<jos\u00e9@example.net>", "553 5.6.7")
}

func FuzzParameters(f *testing.F) {
	for _, s := range []string{"SIZE=1 BODY=8BITMIME", "RET=FULL ENVID=a+2Bb", "NOTIFY=NEVER ORCPT=rfc822;a", `ORCPT=utf-8;\x{E9}`, "HOLDFOR=1 AUTH=<>", "A=B=C"} {
		f.Add(s)
	}
	m, err := newMetrics("fuzz", nil)
	if err != nil {
		f.Fatal(err)
	}
	cfg := Config{Hostname: "mx.example", Mechanisms: []string{"PLAIN"}, Logger: slog.New(slog.DiscardHandler)}
	extended(&cfg, nil)
	c := newConn(&Server{cfg: cfg, metrics: m}, &script{}, OfferSTARTTLS, netip.Addr{}, testLimits())
	now := time.Unix(1_800_000_000, 0)
	f.Fuzz(func(t *testing.T, s string) {
		mail, name, bad := c.parseMail(s, now)
		if reply := string(bad) + printable(name); bad != "" && (strings.ContainsAny(reply, "\r\n") || !isASCII(reply) || len(reply) > 512) {
			t.Errorf("%q gets the reply %q", s, reply)
		}
		if bad == "" && (mail.Size < 0 || len(mail.EnvID) > maxEnvIDBytes || strings.ContainsAny(mail.EnvID, " \r\n=") || mail.Hold.After(now.Add(cfg.MaxHold))) {
			t.Errorf("%q gives %+v", s, mail)
		}
		rcpt, _, bad := c.parseRcpt(s)
		if bad == "" && (rcpt.Notify&relay.NotifyNever != 0 && rcpt.Notify != relay.NotifyNever || len(rcpt.ORCPT) > maxORCPTBytes || strings.ContainsAny(rcpt.ORCPT, " \r\n=")) {
			t.Errorf("%q gives %+v", s, rcpt)
		}
	})
}
