package command

import (
	"errors"
	"strings"
	"testing"

	"github.com/relais-mta/relais/shared/fault"
)

// brakeSamples are the samples of the commands about brakes.
func brakeSamples(meta *Meta) []Command {
	return []Command{
		&BrakeSet{Meta: meta, Brake: &Brake{Id: id(21), Provider: "google", Pool: id(13), Source: id(14), Tenant: id(9), Domain: "gmail.example", Percent: 25, Cause: "complaints", Evidence: "12 of 900",
			EvidenceMs: 900, Owner: "admin", Automatic: true, Node: id(5), CreatedMs: 1000, UntilMs: 2000, Pinned: true}},
		&BrakeCancel{Meta: meta, Expect: 29, Brake: id(21), Rule: "reflex"},
		&BrakePin{Meta: meta, Expect: 30, Brake: id(21), Pinned: true},
		&BrakeSweep{Meta: meta},
	}
}

func TestBrakesThatAreRefused(t *testing.T) {
	brake := func(change func(*Brake)) *BrakeSet {
		b := &Brake{Id: id(21), Provider: "google", Cause: "complaints", Owner: "admin", CreatedMs: 1000, UntilMs: 2000}
		change(b)
		return &BrakeSet{Brake: b}
	}
	for _, tc := range []struct {
		field string
		c     Command
	}{
		{"brake", &BrakeSet{}},
		{"brake", brake(func(b *Brake) { b.Id = nil })},
		{"scope", brake(func(b *Brake) { b.Provider = "" })},
		{"percent", brake(func(b *Brake) { b.Percent = 100 })},
		{"cause", brake(func(b *Brake) { b.Cause = "" })},
		{"cause", brake(func(b *Brake) { b.Cause = strings.Repeat("x", MaxTextBytes+1) })},
		{"evidence", brake(func(b *Brake) { b.Evidence = strings.Repeat("x", MaxEvidenceBytes+1) })},
		{"brake", brake(func(b *Brake) { b.Owner = "" })},
		{"brake", brake(func(b *Brake) { b.EndedMs = 1500 })},
		{"ttl", brake(func(b *Brake) { b.UntilMs = 1000 })},
		{"domain", brake(func(b *Brake) { b.Domain = "Gmail.example" })},
		{"brake", &BrakeCancel{Brake: []byte("x")}},
		{"brake", &BrakePin{}},
	} {
		var f *fault.Error
		if err := tc.c.Validate(); !errors.As(err, &f) || f.Field != tc.field {
			t.Errorf("%v: %v, want an error about %s", tc.c, err, tc.field)
		}
	}
}
