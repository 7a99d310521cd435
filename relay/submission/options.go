package submission

import (
	"time"

	"github.com/relais-mta/relais/shared/fault"
	"github.com/relais-mta/relais/shared/policy"
)

// optionPrefix begins the names of the fields by which a client steers one
// message. They are taken out before the message goes on.
const optionPrefix = "x-relais-"

// Bounds of options.
const (
	maxAhead       = 30 * 24 * time.Hour // X-Relais-Send-At
	maxExpire      = 30 * 24 * time.Hour // X-Relais-Expire, from the first attempt on
	maxTagBytes    = 64
	maxStreamBytes = 64
)

// options is what the X-Relais fields of a message say.
type options struct {
	stream      string          // X-Relais-Stream: name of a stream of the credential's project
	tag         string          // X-Relais-Tag: the client's own mark, kept with the message and its events
	sendAt      time.Time       // X-Relais-Send-At: RFC 3339, at most 30 days ahead; zero or past: at once
	expireAfter time.Duration   // X-Relais-Expire as a duration, counted from sendAt or acceptance
	expireAt    time.Time       // X-Relais-Expire as an RFC 3339 time
	priority    policy.Priority // X-Relais-Priority: 0 to 100 among the mail of the stream
	seen        uint8
}

// The bits of options.seen.
const (
	sawStream uint8 = 1 << iota
	sawTag
	sawSendAt
	sawExpire
	sawPriority
)

// set takes one field. name is for the error, in the client's own spelling.
func (o *options) set(lower, name, text string, now time.Time) error {
	var bit uint8
	var err error
	switch lower {
	case "x-relais-stream":
		bit = sawStream
		if o.stream = text; !isPlain(text, maxStreamBytes) {
			err = badOption(name, "has a stream's name of 1 to %d printable characters", maxStreamBytes)
		}
	case "x-relais-tag":
		bit = sawTag
		if o.tag = text; !isPlain(text, maxTagBytes) {
			err = badOption(name, "has 1 to %d printable characters", maxTagBytes)
		}
	case "x-relais-send-at":
		bit = sawSendAt
		var parseErr error
		if o.sendAt, parseErr = time.Parse(time.RFC3339, text); parseErr != nil {
			err = badOption(name, "has an RFC 3339 time such as 2030-01-31T08:00:00Z")
		} else if o.sendAt.After(now.Add(maxAhead)) {
			err = badOption(name, "is at most 30 days ahead")
		}
	case "x-relais-expire":
		bit = sawExpire
		err = o.setExpire(name, text)
	case "x-relais-priority":
		bit = sawPriority
		var ok bool
		if o.priority, ok = policy.ParsePriority(text); !ok {
			err = badOption(name, "has a whole number from %d to %d, such as %d, which is that of mail without it", policy.MinPriority, policy.MaxPriority, policy.DefaultPriority)
		}
	default:
		return unknownOption(name)
	}
	if err == nil && o.seen&bit != 0 {
		err = badOption(name, "occurs once at most")
	}
	o.seen |= bit
	return err
}

func (o *options) setExpire(name, text string) error {
	if d, err := policy.ParseDuration(text); err == nil {
		if o.expireAfter = d.D(); o.expireAfter < time.Second || o.expireAfter > maxExpire {
			return badOption(name, "is from 1 s to 30 days")
		}
		return nil
	}
	t, err := time.Parse(time.RFC3339, text)
	if err != nil {
		return badOption(name, "has a duration such as 90s or 4h, or an RFC 3339 time")
	}
	o.expireAt = t
	return nil
}

// hold takes the time of the FUTURERELEASE parameter, which is another way to
// say X-Relais-Send-At; zero: there was none.
func (o *options) hold(until time.Time) error {
	switch {
	case until.IsZero():
		return nil
	case o.seen&sawSendAt != 0:
		return badOption("X-Relais-Send-At", "is not said together with HOLDFOR or HOLDUNTIL of MAIL")
	}
	o.sendAt = until
	return nil
}

// check judges the options together, once all are known.
func (o *options) check(now time.Time) error {
	if o.expireAt.IsZero() {
		return nil
	}
	switch start := o.start(now); {
	case !o.expireAt.After(start):
		return badOption("X-Relais-Expire", "lies after the time of sending")
	case o.expireAt.After(start.Add(maxExpire)):
		return badOption("X-Relais-Expire", "is at most 30 days after the time of sending")
	}
	return nil
}

// start is when the message may go out first.
func (o *options) start(now time.Time) time.Time {
	if o.sendAt.After(now) {
		return o.sendAt
	}
	return now
}

// expires is when the message is given up.
func (o *options) expires(now time.Time, byStream time.Duration) time.Time {
	switch {
	case !o.expireAt.IsZero():
		return o.expireAt
	case o.expireAfter > 0:
		return o.start(now).Add(o.expireAfter)
	}
	return o.start(now).Add(byStream)
}

func badOption(name, rule string, args ...any) error {
	return fault.Field("submission.options", name, rule, args...)
}

func unknownOption(name string) error {
	return badOption(clip([]byte(name)), "is not known; there are X-Relais-Stream, -Send-At, -Expire, -Priority and -Tag")
}

// isPlain reports whether s has 1 to limit printable ASCII characters without
// white space at its ends.
func isPlain(s string, limit int) bool {
	if s == "" || len(s) > limit {
		return false
	}
	for i := 0; i < len(s); i++ {
		if s[i] < ' ' || s[i] > '~' {
			return false
		}
	}
	return true
}
