package policy

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/relais-mta/relais/shared/fault"
)

// MaxDuration is the longest Duration a document may hold.
const MaxDuration = Duration(366 * 24 * time.Hour)

// durationOp names the operation in errors; explain finds them by it, because
// the decoder keeps only their text.
const durationOp = "policy.ParseDuration"

// maxDurationBytes bounds the text of one duration.
const maxDurationBytes = 32

var durationUnits = [...]struct {
	name string
	span time.Duration
}{
	{"d", 24 * time.Hour},
	{"h", time.Hour},
	{"m", time.Minute},
	{"s", time.Second},
	{"ms", time.Millisecond},
}

// ParseDuration reads whole numbers with the units d, h, m, s and ms, each at
// most once and the largest first: "90s", "5m", "4d12h". "0" needs no unit.
// A day has 24 hours.
func ParseDuration(text string) (Duration, error) {
	bad := func(why string) (Duration, error) {
		shown := text
		if len(shown) > maxDurationBytes {
			shown = shown[:maxDurationBytes] + "…"
		}
		return 0, fault.New(fault.Invalid, durationOp, "%q is not a duration: %s; write whole numbers with the units d, h, m, s or ms, such as \"5m\" or \"4d12h\"", shown, why)
	}
	if text == "0" {
		return 0, nil
	}
	if text == "" || len(text) > maxDurationBytes {
		return bad("it has no text or too much")
	}
	var total time.Duration
	rest, next := text, 0 // next is the largest unit still allowed
	for rest != "" {
		digits := span(rest, func(c byte) bool { return c >= '0' && c <= '9' })
		letters := span(rest[digits:], func(c byte) bool { return c >= 'a' && c <= 'z' })
		n, err := strconv.ParseInt(rest[:digits], 10, 64)
		if err != nil {
			return bad("a number is missing or too large")
		}
		unit := rest[digits : digits+letters]
		for next < len(durationUnits) && durationUnits[next].name != unit {
			next++
		}
		if next == len(durationUnits) {
			return bad(fmt.Sprintf("the unit %q is unknown or out of order", unit))
		}
		each := durationUnits[next].span
		if n > int64(MaxDuration.D()/each) {
			return bad("it is longer than 366 days")
		}
		total += time.Duration(n) * each
		rest, next = rest[digits+letters:], next+1
	}
	if total > MaxDuration.D() {
		return bad("it is longer than 366 days")
	}
	return Duration(total), nil
}

// span returns how many leading bytes of s satisfy in.
func span(s string, in func(byte) bool) int {
	for i := 0; i < len(s); i++ {
		if !in(s[i]) {
			return i
		}
	}
	return len(s)
}

// UnmarshalText implements encoding.TextUnmarshaler for TOML.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := ParseDuration(string(text))
	if err != nil {
		return err
	}
	*d = v
	return nil
}

// MarshalText implements encoding.TextMarshaler for TOML.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// DurationFlag is a flag of a command, in the form that ParseDuration reads: people
// write lengths of time alike wherever they do. It is a pflag.Value; none has no text.
type DurationFlag time.Duration

// Set implements pflag.Value.
func (f *DurationFlag) Set(text string) error {
	d, err := ParseDuration(text)
	if err != nil {
		return errors.New(fault.Public(err)) // a command line shows what it has itself
	}
	*f = DurationFlag(d)
	return nil
}

// String implements pflag.Value.
func (f *DurationFlag) String() string {
	if f == nil || *f == 0 {
		return ""
	}
	return Duration(*f).String()
}

// Type implements pflag.Value.
func (*DurationFlag) Type() string { return "duration" }

// String returns the text form, "0s" for none. Parts below a millisecond,
// which no document holds, are written in Go's own form.
func (d Duration) String() string {
	if d <= 0 || d%Duration(time.Millisecond) != 0 {
		return d.D().String()
	}
	var out []byte
	rest := d.D()
	for _, u := range durationUnits {
		if n := rest / u.span; n > 0 {
			out = strconv.AppendInt(out, int64(n), 10)
			out = append(out, u.name...)
			rest -= n * u.span
		}
	}
	return string(out)
}
