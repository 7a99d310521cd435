package lab

import (
	"fmt"
	"time"
)

// Names of the simulated providers. An unlisted receiver is named "mx:" and
// its domain.
const (
	Google            = "google"
	MicrosoftConsumer = "microsoft-consumer"
	ExchangeOnline    = "exchange-online"
	Yahoo             = "yahoo"
	Apple             = "apple"
	Orange            = "orange"
	LaPoste           = "laposte"
	SFR               = "sfr"
	Free              = "free"
	GMX               = "gmx"
)

// Domains with a particular place in the DNS. Those that can receive mail
// belong to the provider "mx:" + domain.
const (
	DomainImplicitMX = "implicit.test"   // no MX, an A record (RFC 5321 section 5.1)
	DomainDeadFirst  = "deadfirst.test"  // best MX refuses connections, second one works
	DomainEqualMX    = "equal.test"      // three MX of the same preference
	DomainManyMX     = "manymx.test"     // an MX answer too large for UDP
	DomainNullMX     = "nullmx.test"     // RFC 7505
	DomainNoAddress  = "noaddress.test"  // exists, has neither MX nor address
	DomainDanglingMX = "danglingmx.test" // its MX host does not exist
	DomainServfail   = "servfail.test"   // SERVFAIL
	DomainTimeout    = "timeout.test"    // no answer
	DomainAbsent     = "absent.test"     // NXDOMAIN
)

// Limits are what a provider states per source address. Zero means no limit.
// A source that goes past one of them has breached it: the provider answers
// in its own way and the report names the breach.
type Limits struct {
	Connections              int           // at once
	MessagesPerConnection    int           // messages carried to their final dot on one connection
	Messages                 int           // transactions begun in any RateWindow
	RateWindow               time.Duration // length of the sliding window
	RecipientsPerTransaction int
}

// MXHost is one mail exchanger of a provider.
type MXHost struct {
	Name       string
	Preference uint16
	Addresses  int  // how many addresses it has; 0 means one
	Dead       bool // in DNS, but nothing listens
}

// Profile says how a simulated provider behaves.
type Profile struct {
	Name    string
	Domains []string
	MX      []MXHost
	// MXOf overrides MX for a domain whose MX set is its own; the hosts still
	// belong to this provider.
	MXOf map[string][]MXHost

	Limits         Limits
	DeferShare     float64       // share of tries deferred at RCPT, 0 to 1
	GreylistShare  float64       // share of recipients greylisted at first contact, 0 to 1
	GreylistDelay  time.Duration // how long a greylisted recipient stays deferred
	RequireTLS     bool          // MAIL in clear is refused
	RequirePTR     bool          // MAIL from an address without confirmed reverse DNS is refused; see Config.CheckPTR
	MaxMessageSize int64         // bytes, announced with SIZE (RFC 1870)
	Wording        Wording
	Transcript     *Transcript // played to every connection in place of all the above; nil: none
}

const (
	defaultGreylistDelay  = 2 * time.Second
	defaultRateWindow     = time.Minute
	defaultMaxMessageSize = 25 << 20
	sourceRatePerSecond   = 110 // what receivers without a stated rate bear, a tenth above what is commonly assumed
)

// perMinute builds the limits of a provider from its usual four numbers.
func perMinute(connections, perConnection, messages, recipients int) Limits {
	return Limits{
		Connections: connections, MessagesPerConnection: perConnection,
		Messages: messages, RateWindow: defaultRateWindow, RecipientsPerTransaction: recipients,
	}
}

// DefaultProfiles returns the providers of a lab with n unlisted receivers
// beside the named ones. Connection and per-connection limits are those the
// namesakes state or enforce; rates, which they state per hour or day, are per
// minute here so that a short run meets them.
func DefaultProfiles(n int) []Profile {
	ps := []Profile{
		{
			Name: Google, Domains: []string{"gmail.test", "googlemail.test", "atelier.test"},
			MX: []MXHost{
				{Name: "gmail-smtp-in.l.google.com", Preference: 5, Addresses: 2},
				{Name: "alt1.gmail-smtp-in.l.google.com", Preference: 10},
				{Name: "alt2.gmail-smtp-in.l.google.com", Preference: 20},
			},
			Limits: perMinute(5, 50, 1200, 100), DeferShare: 0.02, RequireTLS: true, RequirePTR: true,
			MaxMessageSize: 35882577, Wording: googleWording,
		},
		{
			Name: MicrosoftConsumer, Domains: []string{"outlook.test", "hotmail.test", "live.test", "msn.test"},
			MX:     []MXHost{{Name: "mx1.hotmail.olc.protection.outlook.com", Preference: 2, Addresses: 2}},
			Limits: perMinute(5, 50, 900, 500), DeferShare: 0.03, MaxMessageSize: 49283072, Wording: microsoftWording,
		},
		{
			Name: ExchangeOnline, Domains: []string{"maison.test", "usine.test"},
			MXOf: map[string][]MXHost{
				"maison.test": {{Name: "maison-test.mail.protection.outlook.com", Preference: 0, Addresses: 2}},
				"usine.test":  {{Name: "usine-test.mail.protection.outlook.com", Preference: 0}},
			},
			Limits: perMinute(5, 50, 900, 500), DeferShare: 0.02, MaxMessageSize: 157286400, Wording: exchangeWording,
		},
		{
			Name: Yahoo, Domains: []string{"yahoo.test", "ymail.test", "aol.test", "sky.test"},
			MX: []MXHost{
				{Name: "mta5.am0.yahoodns.net", Preference: 1},
				{Name: "mta6.am0.yahoodns.net", Preference: 1},
				{Name: "mta7.am0.yahoodns.net", Preference: 1},
			},
			Limits: perMinute(0, 20, 900, 100), DeferShare: 0.05, MaxMessageSize: 41943040, Wording: yahooWording,
		},
		{
			Name: Apple, Domains: []string{"icloud.test", "me.test", "mac.test"},
			MX:     []MXHost{{Name: "mx01.mail.icloud.com", Preference: 10}, {Name: "mx02.mail.icloud.com", Preference: 10}},
			Limits: perMinute(10, 5, 600, 100), DeferShare: 0.02, MaxMessageSize: 28311552, Wording: appleWording,
		},
	}
	ps = append(ps, frenchAndGerman()...)
	for i := range n {
		domain := fmt.Sprintf("boutique-%02d.test", i)
		ps = append(ps, unlisted(domain, MXHost{Name: "mx." + domain, Preference: 10}))
	}
	return append(ps, particular()...)
}

func frenchAndGerman() []Profile {
	return []Profile{
		{
			Name: Orange, Domains: []string{"orange.test", "wanadoo.test"},
			MX:     []MXHost{{Name: "smtp-in.orange.fr", Preference: 10, Addresses: 2}},
			Limits: perMinute(2, 100, 600, 100), DeferShare: 0.03, RequirePTR: true, MaxMessageSize: 45 << 20, Wording: orangeWording,
		},
		{
			Name: LaPoste, Domains: []string{"laposte.test"},
			MX:     []MXHost{{Name: "smtpz4.laposte.net", Preference: 10}},
			Limits: perMinute(2, 100, 600, 100), DeferShare: 0.03, Wording: laPosteWording,
		},
		{
			Name: SFR, Domains: []string{"sfr.test", "neuf.test", "numericable.test", "cegetel.test"},
			MX:     []MXHost{{Name: "smtp-in.sfr.fr", Preference: 10, Addresses: 2}},
			Limits: perMinute(2, 0, 600, 100), DeferShare: 0.03, Wording: sfrWording,
		},
		{
			Name: Free, Domains: []string{"free.test", "aliceadsl.test"},
			MX:     []MXHost{{Name: "mx1.free.fr", Preference: 10}, {Name: "mx2.free.fr", Preference: 20}},
			Limits: perMinute(2, 0, 300, 100), DeferShare: 0.05, GreylistShare: 0.10, Wording: freeWording,
		},
		{
			Name: GMX, Domains: []string{"gmx.test", "webde.test", "mailcom.test"},
			MX:     []MXHost{{Name: "mx00.gmx.net", Preference: 10}, {Name: "mx01.gmx.net", Preference: 10}},
			Limits: perMinute(4, 20, 600, 100), DeferShare: 0.03, RequireTLS: true, MaxMessageSize: 157286400, Wording: gmxWording,
		},
	}
}

// particular returns the receivers whose place in the DNS is the point.
func particular() []Profile {
	many := make([]MXHost, 40)
	for i := range many {
		many[i] = MXHost{Name: fmt.Sprintf("exchanger-number-%02d.mail.%s", i, DomainManyMX), Preference: uint16(10 + i), Dead: i > 0}
	}
	many[0].Dead = false
	return []Profile{
		unlisted(DomainImplicitMX),
		unlisted(DomainDeadFirst,
			MXHost{Name: "mx1." + DomainDeadFirst, Preference: 10, Dead: true},
			MXHost{Name: "mx2." + DomainDeadFirst, Preference: 20}),
		unlisted(DomainEqualMX,
			MXHost{Name: "mx1." + DomainEqualMX, Preference: 10},
			MXHost{Name: "mx2." + DomainEqualMX, Preference: 10},
			MXHost{Name: "mx3." + DomainEqualMX, Preference: 10}),
		unlisted(DomainManyMX, many...),
	}
}

// unlisted is a small receiver nobody ships a profile for.
func unlisted(domain string, mx ...MXHost) Profile {
	return Profile{
		Name: "mx:" + domain, Domains: []string{domain}, MX: mx,
		Limits:        perMinute(10, 100, sourceRatePerSecond*60, 100),
		GreylistShare: 0.20, Wording: plainWording,
	}
}

// complete fills what a profile leaves to the defaults.
func (p *Profile) complete() error {
	if p.Name == "" || len(p.Domains) == 0 {
		return fmt.Errorf("lab: profile %q: a name and at least one domain are needed", p.Name)
	}
	if p.DeferShare < 0 || p.DeferShare > 1 || p.GreylistShare < 0 || p.GreylistShare > 1 {
		return fmt.Errorf("lab: profile %s: shares lie between 0 and 1", p.Name)
	}
	if p.GreylistDelay == 0 {
		p.GreylistDelay = defaultGreylistDelay
	}
	if p.MaxMessageSize == 0 {
		p.MaxMessageSize = defaultMaxMessageSize
	}
	if p.Wording.Banner == "" {
		p.Wording = plainWording
	}
	return p.Limits.check(p.Name)
}

func (l Limits) check(provider string) error {
	switch {
	case l.Connections < 0 || l.MessagesPerConnection < 0 || l.Messages < 0 || l.RecipientsPerTransaction < 0:
		return fmt.Errorf("lab: limits of %s: a limit is never negative, 0 is none", provider)
	case l.Messages > maxRateMessages:
		return fmt.Errorf("lab: limits of %s: Messages is at most %d", provider, maxRateMessages)
	case l.Messages > 0 && l.RateWindow <= 0:
		return fmt.Errorf("lab: limits of %s: Messages needs a RateWindow", provider)
	}
	return nil
}
